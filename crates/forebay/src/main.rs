//! Forebay: the LLM serving stack in one program.
fn main() {}
