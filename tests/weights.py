"""State of weights, for tests that run lowered programs by themselves."""

from chipmunk_compile.passes.lower import lift_state, weights_program


def write_weights(gm, treatments, inputs, state) -> list:
    """Fills what of `state` (of `lift_state`, perhaps with more behind it) is derived from weights; returns `state`."""
    program, read = weights_program(gm, treatments)
    weights = [tensor for tensor, spec in zip(state, lift_state(treatments)) if spec.scope == "weights"]
    program(*(value if i in read else None for i, value in enumerate(inputs)), *weights)
    return state
