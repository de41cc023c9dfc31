"""What a quantizer's descriptor says, as attributes of the quantizer."""

from lq.descriptor import QuantDescriptor
from lq.functional.grid import Bits


class Described:
    """Fields of ``quant_desc``; setting one gives the quantizer another descriptor."""

    quant_desc: QuantDescriptor

    @property
    def axis(self) -> int | tuple[int, ...] | None:
        """Dimensions with an amax of their own."""
        return self.quant_desc.axis

    @property
    def num_bits(self) -> Bits:
        """Width of the integer, or the float format. Can be set."""
        return self.quant_desc.num_bits

    @num_bits.setter
    def num_bits(self, value: Bits) -> None:
        self.quant_desc = self.quant_desc.replace(num_bits=value)

    @property
    def unsigned(self) -> bool:
        """Whether codes start at 0. Can be set."""
        return self.quant_desc.unsigned

    @unsigned.setter
    def unsigned(self, value: bool) -> None:
        self.quant_desc = self.quant_desc.replace(unsigned=value)

    @property
    def narrow_range(self) -> bool:
        """Whether signed codes leave out the most negative one. Can be set."""
        return self.quant_desc.narrow_range

    @narrow_range.setter
    def narrow_range(self, value: bool) -> None:
        self.quant_desc = self.quant_desc.replace(narrow_range=value)

    @property
    def fake_quant(self) -> bool:
        """Whether outputs are real values on the grid (else integer codes)."""
        return self.quant_desc.fake_quant
