"""A small trained diffusion transformer, its pictures and its sampler.

`words` is the vocabulary, `scenes` + `shapes` + `backdrops` + `objects` + `pictures` draw the training set,
`sampling` loads the weights and denoises, `png` writes what came out.
"""
