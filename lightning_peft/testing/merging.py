"""Folding adapters into the weights of the base, and taking them out again."""

from __future__ import annotations

import pytest
import torch

from lightning_peft.activation import adapters_disabled
from lightning_peft.adapter_layer import adapter_layers
from lightning_peft.errors import MergeError
from lightning_peft.merging import merge_adapters, unmerge_adapters
from lightning_peft.surgery import unload_adapters
from lightning_peft.testing.subject import Subject, base_tensors, differing, distance, refused


class MergingTests(Subject):
    """Tests of merging, which a method declares with ``mergeable``."""

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_merged_equals_unmerged(self, dtype: torch.dtype) -> None:
        """The merged base acts as the base with the adapter around it."""
        self.need("mergeable")
        model = self.trained(dtype)
        adapted, base = self.outputs(model), self.outputs(self.base(dtype))
        effect = distance(adapted, base)
        merge_adapters(model)
        off = distance(self.outputs(model), adapted)
        assert off <= self.tolerance[dtype], (
            f"in {dtype} merging changes the output by {off:.2g} of its size, more than {self.tolerance[dtype]:.2g} "
            f"(the adapter itself: {effect:.2g}); check merged_parameters"
        )
        assert effect > 2 * off, (
            f"in {dtype} the adapter changes the output by {effect:.2g} only: too little to test merging"
        )

    def test_a_method_that_cannot_merge_says_so(self) -> None:
        """Without ``mergeable`` a merge is refused and changes nothing."""
        if self.method.mergeable:
            pytest.skip(f"{self.method.name} declares mergeable = True")
        model = self.trained()
        before, output = base_tensors(model), self.outputs(model)
        with refused(MergeError, "a method with mergeable = False was merged"):
            merge_adapters(model)
        assert not differing(before, base_tensors(model)), "a refused merge changed the base"
        assert torch.equal(self.outputs(model), output), "a refused merge changed the output"

    def test_unmerging_restores_the_base(self) -> None:
        """Bit for bit: the base has not passed through arithmetic."""
        self.need("mergeable")
        model = self.trained()
        before, output = base_tensors(model), self.outputs(model)
        merge_adapters(model)
        assert differing(before, base_tensors(model)), "merging changed no weight of the base; check merged_parameters"
        unmerge_adapters(model)
        changed = differing(before, base_tensors(model))
        assert not changed, f"unmerging does not restore {changed[:3]}; merged_parameters must not write to the base"
        assert torch.equal(self.outputs(model), output), "after unmerging the adapter gives another output"

    def test_merging_twice_is_refused(self) -> None:
        """A second merge would apply the adapter twice."""
        self.need("mergeable")
        model = self.trained()
        merge_adapters(model)
        once = base_tensors(model)
        with refused(MergeError, "an adapter was merged twice"):
            merge_adapters(model, "default")
        assert not differing(once, base_tensors(model)), "the refused second merge changed the base"

    def test_disabled_is_the_base_even_when_merged(self) -> None:
        """Measuring the base takes merged adapters out, and puts them back."""
        self.need("mergeable")
        model = self.trained()
        merge_adapters(model)
        merged = self.outputs(model)
        with adapters_disabled(model):
            disabled = self.outputs(model)
        assert torch.equal(disabled, self.outputs(self.base())), "disabled after a merge, the model is not the base"
        assert torch.equal(self.outputs(model), merged), "enabled again after a merge, the model gives another output"

    def test_unloading_keeps_what_was_merged(self) -> None:
        """A merged model without adapter layers is a plain model."""
        self.need("mergeable")
        model = self.trained()
        merge_adapters(model)
        merged = self.outputs(model)
        plain = unload_adapters(model)
        assert not adapter_layers(plain), "adapter layers are left after unload_adapters"
        assert torch.equal(self.outputs(plain), merged), "unloading changed the output of the merged model"
