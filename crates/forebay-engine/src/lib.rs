//! L5: the inference engine.
