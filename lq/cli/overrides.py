"""What was said on the command line."""


def key_of(override: str) -> str:
    """What an override sets.

    >>> key_of("+trainer.fast_dev_run=true"), key_of("quant=int8")
    ('trainer.fast_dev_run', 'quant')
    """
    return override.lstrip("+~").split("=", 1)[0]
