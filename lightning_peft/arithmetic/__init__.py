"""What methods put around a module: adapters that several methods share, or that are too large for one file with their method.

The last two are what the tools for finished adapters reckon with.

=========================  ===================================================================
``low_rank``               LoRA on every kind of layer
``trained_bias``           a bias alone
``low_rank_experts``       on fused experts of three dimensions
``gpu_low_rank``           by Triton kernels, which ``triton_low_rank`` holds
``tied_low_rank``          on one weight that several modules use
``weight_decomposed``      a direction and a length (DoRA)
``singular_triplets``      P diag(E) Q, triplet by triplet (AdaLoRA)
``initial_pairs``          updates that start from a part of the weight (PiSSA, OLoRA, LoRA-GA)
``bottlenecks``            where narrow networks stand in a block (Bottleneck, Compacter)
``parameter_copies``       trainable copies of a module's own parameters
``prefixes``               keys and values in front of those of attention
``prompts``                virtual tokens in front of the input
``chunked_cross_entropy``  losses of heads over a vocabulary, some tokens at a time
``thin_products``          measures and best approximations of a product B A that is never written out
``task_vectors``           one tensor from several: sums, TIES, DARE, pruning
=========================  ===================================================================
"""
