"""What a quantizer is set to do."""


class Switches:
    """Switches of a quantizer; ``disable`` goes before all others."""

    _disabled: bool
    _if_quant: bool
    _if_calib: bool

    def enable(self) -> None:
        """Take part again after :meth:`disable`."""
        self._disabled = False

    def disable(self) -> None:
        """Neither quantize nor collect, whatever else is set."""
        self._disabled = True

    def enable_quant(self) -> None:
        """Quantize."""
        self._if_quant = True

    def disable_quant(self) -> None:
        """Do not quantize; statistics are still collected if calibration is enabled."""
        self._if_quant = False

    def enable_calib(self) -> None:
        """Collect statistics in every forward."""
        self._if_calib = True

    def disable_calib(self) -> None:
        """Stop collecting statistics; those at hand stay."""
        self._if_calib = False
