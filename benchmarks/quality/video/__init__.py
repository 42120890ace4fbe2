"""Moving scenes drawn as they are needed: `words` names what is in them, `scenes` throws the dice, `textures` makes
surfaces, `drawing` makes clips of them. Pure torch, on the device that trains."""
