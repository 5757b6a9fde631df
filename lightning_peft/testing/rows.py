"""Rows of one batch with adapters of their own: what ``row_routable`` promises."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lightning_peft.activation import set_active_adapters
from lightning_peft.errors import InjectionError
from lightning_peft.rows import adapter_rows, set_row_adapters
from lightning_peft.testing.subject import Subject, adapter_parameters, refused

_NAMES = ("default", "other")


class RowTests(Subject):
    """Tests of two adapters and the base in one batch."""

    def test_rows_with_adapters_of_their_own_are_separate_passes(self) -> None:
        """With ``row_routable``, one batch gives each row what a pass with its adapter alone gives it, and so do the gradients."""
        if not self.method.row_routable:
            model = self.adapted()
            why = "rows were given to a method with row_routable = False"
            with refused(InjectionError, why), adapter_rows(model, ["default"]):
                pass
            return
        model = self.trained()
        self.inject(model, "other")
        self.train(model, seed=5)
        set_row_adapters(model, _NAMES)
        set_active_adapters(model, [])
        count = len(self.outputs(model))
        rows: list[str | None] = [("default", None, "other")[row % 3] for row in range(count)]
        with adapter_rows(model, rows):
            together = self.outputs(model)
            found = self._row_gradients(model, range(count))
        wanted: dict[str, Tensor] = {}
        for name in dict.fromkeys(rows):
            chosen = [row for row, other in enumerate(rows) if other == name]
            set_active_adapters(model, [] if name is None else name)
            alone = self.outputs(model)
            for row in chosen:
                assert self.close(together[row], alone[row]), (
                    f"row {row}, with the adapter {name!r} among others, is not what it is in a pass with {name!r} alone; set row_routable = False"
                )
            if name is not None:
                gradients = self._row_gradients(model, chosen).items()
                wanted.update({key: value for key, value in gradients if f":{name}." in key})
        assert wanted, "no gradient reaches an adapter in a pass of its own"
        scale = max(float(gradient.abs().max()) for gradient in wanted.values())
        for key, gradient in wanted.items():
            assert key in found, f"{key} gets no gradient where each row has an adapter of its own"
            off = float((found[key] - gradient).abs().max())
            assert off <= self.tolerance[torch.float32] * scale, (
                f"the gradient of {key} differs by {off:.1e} where each row has an adapter of its own; set row_routable = False"
            )

    def _row_gradients(self, model: nn.Module, rows: Sequence[int]) -> dict[str, Tensor]:
        """Return the gradients of a loss of some rows, by parameter of an adapter."""
        model.zero_grad()
        output = self.forward(model)
        goal = torch.randn(output.shape, generator=torch.Generator().manual_seed(7))
        chosen = list(rows)
        torch.autograd.backward((output[chosen].float() - goal[chosen]).square().sum())
        found = {key: p.grad.clone() for key, p in adapter_parameters(model).items() if p.grad is not None}
        model.zero_grad()
        return found
