"""Quantized LSTM, layers and cell: arguments as in ``torch.nn``, and ``quant_desc_input``, ``quant_desc_weight``.

The equations are those of ``nn.LSTM`` (Hochreiter & Schmidhuber, 1997; projections: Sak et al., 2014, arXiv:1402.1128) with every
factor of a matrix product quantized; biases, gates and the cell state stay float. NVIDIA pytorch-quantization's ``QuantLSTM`` has
one quantizer for ``cat(x, h)``: here the input and the hidden state, which lies within 1, have one each.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence

from lq.descriptor import QuantDescriptor
from lq.nn.quant_module import QuantModule, register
from lq.nn.tensor_quantizer import TensorQuantizer

State = tuple[Tensor, Tensor]


def lstm_step(gates: Tensor, c: Tensor) -> State:
    """Next hidden and cell state ``(batch, hidden)`` from the gates before their activation, ``(batch, 4 * hidden)``.

    The gates stand in torch's order: input, forget, cell, output.

    >>> lstm_step(torch.tensor([[0.0, 0.0, 9.0, 9.0]]), c=torch.ones(1, 1))
    (tensor([[0.7615]]), tensor([[1.]]))
    """
    i, f, g, o = gates.chunk(4, dim=1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


@register(nn.LSTMCell)
class QuantLSTMCell(QuantModule, nn.LSTMCell):
    """``nn.LSTMCell`` on ``Q(x)`` and ``Q(h)`` with ``Q(W_ih)`` and ``Q(W_hh)``.

    >>> cell = QuantLSTMCell(1, 1, bias=False, quant_desc_input=QuantDescriptor(amax=1.27))
    >>> _ = [nn.init.ones_(p) for p in cell.parameters()]
    >>> cell(torch.tensor([[0.104], [0.1]]))[0].detach()
    tensor([[0.0274], [0.0274]])
    """

    input_quantizer: TensorQuantizer
    hidden_quantizer: TensorQuantizer
    weight_ih_quantizer: TensorQuantizer
    weight_hh_quantizer: TensorQuantizer

    def init_quantizer(
        self, quant_desc_input: QuantDescriptor | None = None, quant_desc_weight: QuantDescriptor | None = None
    ) -> None:
        self.make_quantizers(quant_desc_input, "input", "hidden")
        self.make_quantizers(quant_desc_weight, "weight_ih", "weight_hh")

    def forward(self, input: Tensor, hx: State | None = None) -> State:
        """Next ``(h, c)``, ``(batch, hidden)`` each, from ``(batch, input)``; without ``batch`` for a single sample."""
        if self.idle:
            return super().forward(input, hx)
        if input.dim() == 1:
            h, c = self.forward(input.unsqueeze(0), None if hx is None else (hx[0].unsqueeze(0), hx[1].unsqueeze(0)))
            return h.squeeze(0), c.squeeze(0)
        shape = (input.shape[0], self.hidden_size)
        h, c = hx or (input.new_zeros(shape), input.new_zeros(shape))
        if input.dim() != 2 or h.shape != shape or c.shape != shape:  # a state for one sample would be broadcast
            raise ValueError(f"LSTMCell: `input` {tuple(input.shape)} and `hx` {tuple(h.shape)}, {tuple(c.shape)} do not fit.")
        gates = F.linear(self.input_quantizer(input), self.weight_ih_quantizer(self.weight_ih), self.bias_ih)
        gates = gates + F.linear(self.hidden_quantizer(h), self.weight_hh_quantizer(self.weight_hh), self.bias_hh)
        return lstm_step(gates, c)


@register(nn.LSTM)
class QuantLSTM(QuantModule, nn.LSTM):
    """``nn.LSTM`` whose layers multiply ``Q(x)`` with ``Q(W_ih)``, ``Q(h)`` with ``Q(W_hh)``, and a projected h with ``Q(W_hr)``.

    Each layer and direction ``s`` (``l0``, ``l0_reverse``, ``l1`` ...) has quantizers of its own: ``input_s``, ``hidden_s``,
    ``weight_ih_s``, ``weight_hh_s``, and with ``proj_size`` ``projection_s``, ``weight_hr_s``. What ``input_s`` quantizes is
    ``(values, features)``, all time steps of all sequences; the others of a step are ``(batch, features)``. ``torch.compile``
    leaves out any ``nn.LSTM``, so also this one, unless ``torch._dynamo.config.allow_rnn`` is on.

    >>> lstm = QuantLSTM(1, 1, bias=False, quant_desc_input=QuantDescriptor(amax=1.27))
    >>> _ = [nn.init.ones_(p) for p in lstm.parameters()]
    >>> lstm(torch.tensor([[0.104], [0.196]]))[0].detach(), lstm(torch.tensor([[0.1], [0.2]]))[0].detach()
    (tensor([[0.0274], [0.0857]]), tensor([[0.0274], [0.0857]]))
    """

    def init_quantizer(
        self, quant_desc_input: QuantDescriptor | None = None, quant_desc_weight: QuantDescriptor | None = None
    ) -> None:
        inputs, weights = ["input", "hidden"], ["weight_ih", "weight_hh"]
        if self.proj_size:
            inputs, weights = [*inputs, "projection"], [*weights, "weight_hr"]
        for suffix in (s for layer in range(self.num_layers) for s in self._suffixes(layer)):
            self.make_quantizers(quant_desc_input, *(f"{role}_{suffix}" for role in inputs))
            self.make_quantizers(quant_desc_weight, *(f"{role}_{suffix}" for role in weights))

    def _suffixes(self, layer: int) -> list[str]:
        return [f"l{layer}", f"l{layer}_reverse"] if self.bidirectional else [f"l{layer}"]

    def forward(self, input: Tensor | PackedSequence, hx: State | None = None) -> tuple[Any, State]:
        """As ``nn.LSTM``: a tensor, batched or not, or a ``PackedSequence``, whose padding no quantizer sees."""
        if self.idle:
            return super().forward(input, hx)
        if isinstance(input, PackedSequence):
            data, sizes, order, inverse = input
            output, state = self._layers(data, sizes.tolist(), self.permute_hidden(self._start(data, hx, sizes), order))
            return PackedSequence(output, sizes, order, inverse), self.permute_hidden(state, inverse)
        if input.dim() == 2:
            batch_dim = 0 if self.batch_first else 1
            hx = None if hx is None else (hx[0].unsqueeze(1), hx[1].unsqueeze(1))
            output, (h, c) = self.forward(input.unsqueeze(batch_dim), hx)
            return output.squeeze(batch_dim), (h.squeeze(1), c.squeeze(1))
        start = self._start(input, hx, None)
        x = input.transpose(0, 1) if self.batch_first else input
        steps, batch = x.shape[:2]
        output, state = self._layers(x.flatten(0, 1), [batch] * steps, start)
        output = torch.unflatten(output, 0, (steps, batch))
        return output.transpose(0, 1) if self.batch_first else output, state

    def _start(self, input: Tensor, hx: State | None, sizes: Tensor | None) -> State:
        self.check_input(input, sizes)
        if sizes is None and input.shape[0 if not self.batch_first else 1] == 0:
            raise RuntimeError(f"`input` has shape {tuple(input.shape)}: it needs at least one time step.")
        if hx is None:
            h = input.new_zeros(self.get_expected_hidden_size(input, sizes))
            return h, input.new_zeros(self.get_expected_cell_size(input, sizes))
        self.check_forward_args(input, hx, sizes)  # a state for one sequence would be broadcast
        return hx

    def _layers(self, x: Tensor, sizes: list[int], start: State) -> tuple[Tensor, State]:
        """All layers on packed data ``(values, features)``, of which step t is the next ``sizes[t]`` rows."""
        finals: list[State] = []
        for layer in range(self.num_layers):
            if layer:
                x = F.dropout(x, self.dropout, self.training)
            outputs = []
            for suffix in self._suffixes(layer):
                output, final = self._direction(x, sizes, suffix, (start[0][len(finals)], start[1][len(finals)]))
                outputs.append(output)
                finals.append(final)
            x = torch.cat(outputs, dim=1)
        return x, (torch.stack([h for h, _ in finals]), torch.stack([c for _, c in finals]))

    def _direction(self, x: Tensor, sizes: list[int], suffix: str, state: State) -> tuple[Tensor, State]:
        """One layer in one direction; a sequence that is over, or in reverse not there yet, keeps its state."""

        def quantized(role: str, value: Tensor | None = None) -> Tensor:
            value = getattr(self, f"{role}_{suffix}") if value is None else value
            result: Tensor = getattr(self, f"{role}_{suffix}_quantizer")(value)
            return result

        bias_ih, bias_hh = (getattr(self, f"{role}_{suffix}", None) for role in ("bias_ih", "bias_hh"))
        # what does not wait for h, for all steps at once
        steps = torch.split(F.linear(quantized("input", x), quantized("weight_ih"), bias_ih), sizes)
        weight_hh = quantized("weight_hh")
        weight_hr = quantized("weight_hr") if self.proj_size else None
        way = -1 if suffix.endswith("reverse") else 1
        outputs: list[Tensor] = []
        for gates in steps[::way]:
            h, c = (s[: gates.shape[0]] for s in state)
            gates = gates + F.linear(quantized("hidden", h), weight_hh, bias_hh)
            # under autocast the gates are in its dtype, and so are all results, as those of nn.LSTM
            h, c = lstm_step(gates, c.to(gates.dtype))
            h = h if weight_hr is None else F.linear(quantized("projection", h), weight_hr)
            outputs.append(h)
            state = _first_rows(state[0], h), _first_rows(state[1], c)
        return torch.cat(outputs[::way]), state


def _first_rows(old: Tensor, new: Tensor) -> Tensor:
    old = old.to(new.dtype)
    return new if new.shape[0] == old.shape[0] else torch.cat([new, old[new.shape[0] :]])
