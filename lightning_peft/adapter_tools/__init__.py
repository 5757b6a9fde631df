"""Verbs on finished adapters: combine several, compare two, cut the rank, convert to LoRA, distil.

=================  ==========================================================================================
``updates``        the low-rank updates of an adapter, in a model or in a folder, and the way into a model
``lora_folder``    a LoRA folder written from updates, without a model
``combining``      several adapters with weights
``comparing``      the difference of two adapters; singular values
``pruning``        the best approximation of lower rank
``changes``        what an adapter of any method adds to the parameters of the base
``conversion``     any mergeable change of weights as LoRA; two checkpoints as LoRA
``distilling``     a small adapter trained to answer as a large one
=================  ==========================================================================================
"""
