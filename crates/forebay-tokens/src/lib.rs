//! Tokenizer, chat template, incremental detokenizer and stop matcher. Pure.
