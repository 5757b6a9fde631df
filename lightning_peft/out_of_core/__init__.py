"""Merging a folder of weights that is never loaded: tensor by tensor from the base's files into new ones.

* :mod:`~lightning_peft.out_of_core.tensor_files`: reading and writing safetensors files, one tensor in memory at a time
* :mod:`~lightning_peft.out_of_core.checkpoints`: the tensors of a model folder, and which parameters of the model they are
* :mod:`~lightning_peft.out_of_core.folder_merge`: the merge
"""

from lightning_peft.out_of_core.folder_merge import merge_folder

__all__ = ["merge_folder"]
