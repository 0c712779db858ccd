//! How text is cut into words before BPE, by the name that a GGUF carries in `tokenizer.ggml.pre`.
//!
//! A wrong cut gives plausible ids that the model was never trained on, so an unknown name is an error and not a
//! default. The table is llama.cpp's (`llm_tokenizer_bpe` in `llama-vocab.cpp`); where that file carries the original
//! pattern of the model's `tokenizer.json` beside one adapted to its own regex engine, the original stands here.
//! Not in the table: names that need custom code there (`kimi-k2`, `afmoe`) or SentencePiece-like BPE (`gemma4`).

use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::digits::Digits;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{PreTokenizerWrapper, SplitDelimiterBehavior};

use crate::vocab::BuildError;
use crate::words;

/// One step of the cut; each step cuts the pieces of the step before.
enum Cut {
    /// Each numeric character alone: `\p{N}`.
    EachDigit,
    /// GPT-2's own pattern, compiled once in the library.
    Gpt2,
    Pattern(&'static str),
}

pub(crate) struct Pre {
    names: &'static [&'static str],
    cuts: &'static [Cut],
    /// A word that is a token is that token, whatever the merges say.
    pub(crate) ignore_merges: bool,
}

const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN2: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN35: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const MINICPM5: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}+| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const SEED_CODER: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1}| ?[^\s\p{L}\p{N}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+";
const BAILING: &str =
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+";
const TEKKEN: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const GPT4O: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const DEEPSEEK_V3: &str = r##"[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"##;

const TABLE: &[Pre] = &[
    Pre {
        names: &[
            "smollm",
            "starcoder",
            "refact",
            "command-r",
            "codeshell",
            "exaone",
            "minerva-7b",
            "mellum2",
        ],
        cuts: &[Cut::EachDigit, Cut::Gpt2],
        ignore_merges: false,
    },
    Pre {
        names: &[
            "gpt-2",
            "phi-2",
            "gigachat",
            "a.x-4.0",
            "mellum",
            "mpt",
            "olmo",
            "jais",
            "trillion",
            "granite-docling",
            "exaone4",
            "modern-bert",
        ],
        cuts: &[Cut::Gpt2],
        ignore_merges: false,
    },
    Pre {
        names: &[
            "llama-bpe",
            "llama3",
            "llama-v3",
            "falcon3",
            "falcon-h1",
            "pixtral",
            "midm-2.0",
            "lfm2",
            "glm4",
            "glm5",
        ],
        cuts: &[Cut::Pattern(LLAMA3)],
        ignore_merges: true,
    },
    Pre { names: &["dbrx", "smaug-bpe", "chatglm-bpe"], cuts: &[Cut::Pattern(LLAMA3)], ignore_merges: false },
    Pre {
        names: &[
            "qwen2",
            "deepseek-r1-qwen",
            "stablelm2",
            "hunyuan",
            "megrez",
            "grok-2",
            "kormo",
            "solar-open",
            "f2llmv2",
        ],
        cuts: &[Cut::Pattern(QWEN2)],
        ignore_merges: false,
    },
    Pre { names: &["qwen35"], cuts: &[Cut::Pattern(QWEN35)], ignore_merges: false },
    Pre {
        names: &["deepseek-v3", "hunyuan-dense", "joyai-llm"],
        cuts: &[
            Cut::Pattern(r"\p{N}{1,3}"),
            Cut::Pattern("[一-龥\u{3040}-ゟ゠-ヿ]+"),
            Cut::Pattern(DEEPSEEK_V3),
        ],
        ignore_merges: false,
    },
    Pre {
        names: &["deepseek-coder"],
        cuts: &[
            Cut::Pattern(r"[\r\n]"),
            Cut::Pattern(r"\s?\p{L}+"),
            Cut::Pattern(r"\s?\p{P}+"),
            Cut::Pattern("[一-龥ࠀ-一가-\u{d7ff}]+"),
            Cut::EachDigit,
        ],
        ignore_merges: false,
    },
    Pre { names: &["tekken"], cuts: &[Cut::Pattern(TEKKEN)], ignore_merges: true },
    Pre {
        names: &["gpt-4o", "llama4", "kanana2", "talkie", "minimax-m2"],
        cuts: &[Cut::Pattern(GPT4O)],
        ignore_merges: false,
    },
    Pre {
        names: &["minicpm5"],
        cuts: &[Cut::Pattern(r"\p{N}{1,3}"), Cut::Pattern(MINICPM5)],
        ignore_merges: true,
    },
    Pre { names: &["seed-coder"], cuts: &[Cut::Pattern(SEED_CODER)], ignore_merges: false },
    Pre {
        names: &["bailingmoe", "bailingmoe2", "llada-moe"],
        cuts: &[Cut::Pattern(BAILING)],
        ignore_merges: false,
    },
    Pre {
        names: &["falcon"],
        cuts: &[Cut::Pattern(r"[\p{P}\$\+<=>\^~\|`]+"), Cut::Gpt2, Cut::Pattern("[0-9][0-9][0-9]")],
        ignore_merges: false,
    },
    Pre {
        names: &["default"],
        cuts: &[
            Cut::Pattern(r"[\p{P}\$\+<=>\^~\|]+"),
            Cut::Gpt2,
            Cut::Pattern(r"\p{N}+"),
            Cut::Pattern("[0-9][0-9][0-9]"),
        ],
        ignore_merges: false,
    },
];

/// All known names, for an error message.
pub(crate) fn names() -> impl Iterator<Item = &'static str> {
    TABLE.iter().flat_map(|pre| pre.names.iter().copied())
}

/// The entry by its GGUF name. A GGUF without the key (old files) says "", which llama.cpp takes as `default`.
pub(crate) fn find(name: &str) -> Result<&'static Pre, BuildError> {
    let wanted = if name.is_empty() { "default" } else { name };
    TABLE
        .iter()
        .find(|pre| pre.names.contains(&wanted))
        .ok_or_else(|| BuildError::UnknownPre { pre: name.to_owned() })
}

impl Pre {
    /// The cut that `words.rs` does by hand, if it is one of those.
    pub(crate) fn by_hand(&self) -> Option<words::Cut> {
        match self.cuts {
            [Cut::Gpt2] => Some(words::Cut::Gpt2 { each_digit: false }),
            [Cut::EachDigit, Cut::Gpt2] => Some(words::Cut::Gpt2 { each_digit: true }),
            [Cut::Pattern(pattern)] => pattern_by_hand(pattern),
            _ => None,
        }
    }

    /// The cut by the library.
    pub(crate) fn by_library(&self) -> Result<PreTokenizerWrapper, BuildError> {
        let mut steps: Vec<PreTokenizerWrapper> = Vec::with_capacity(self.cuts.len() + 1);
        let mut in_alphabet = false;
        for (index, cut) in self.cuts.iter().enumerate() {
            match cut {
                Cut::EachDigit => steps.push(Digits::new(true).into()),
                // As the last step, the library's own GPT-2 cut also maps bytes to the alphabet. In the middle it must
                // not: later patterns look at the text itself.
                Cut::Gpt2 if index + 1 == self.cuts.len() => {
                    steps.push(ByteLevel::new(false, true, true).into());
                    in_alphabet = true;
                }
                Cut::Gpt2 => steps.push(split(
                    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
                )?),
                Cut::Pattern(pattern) => steps.push(split(pattern)?),
            }
        }
        if !in_alphabet {
            steps.push(ByteLevel::new(false, true, false).into());
        }
        Ok(PreTokenizerWrapper::Sequence(Sequence::new(steps)))
    }
}

/// The cut that `words.rs` does by hand for a regular expression.
pub(crate) fn pattern_by_hand(pattern: &str) -> Option<words::Cut> {
    match pattern {
        LLAMA3 => Some(words::Cut::Llama3 { digits_max: 3, marks: false }),
        QWEN2 => Some(words::Cut::Llama3 { digits_max: 1, marks: false }),
        QWEN35 => Some(words::Cut::Llama3 { digits_max: 1, marks: true }),
        _ => None,
    }
}

fn split(pattern: &str) -> Result<PreTokenizerWrapper, BuildError> {
    Split::new(SplitPattern::Regex(pattern.to_owned()), SplitDelimiterBehavior::Isolated, false)
        .map(Into::into)
        .map_err(BuildError::Library)
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokenizers::{OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer};

    fn check(pre: &str, text: &str, expect: &[&str]) {
        let cutter = find(pre).unwrap().by_library().unwrap();
        let mut pieces = PreTokenizedString::from(text);
        cutter.pre_tokenize(&mut pieces).unwrap();
        let got: Vec<&str> = pieces
            .get_splits(OffsetReferential::Original, OffsetType::Byte)
            .into_iter()
            .map(|(_, (start, end), _)| &text[start..end])
            .collect();
        assert_eq!(got, expect, "pre {pre}, text {text:?}");
    }

    #[test]
    fn cuts_as_the_models_were_trained() {
        // Golden: the pre-tokenizers of the Python package, but for `default`, which is llama.cpp's alone.
        let text = "I'LL pay  1234€ (now)!\n\n  ok";
        let check = |pre, expect: &str| check(pre, text, &expect.split('_').collect::<Vec<_>>());
        check("smollm", "I_'_LL_ pay_  _1_2_3_4_€_ (_now_)!_\n\n _ ok");
        check("gpt-2", "I_'_LL_ pay_ _ 1234_€_ (_now_)!_\n\n _ ok");
        check("llama-bpe", "I_'LL_ pay_ _ _123_4_€_ (_now_)!\n\n_ _ ok");
        check("qwen2", "I_'LL_ pay_ _ _1_2_3_4_€_ (_now_)!\n\n_ _ ok");
        check("tekken", "I_'LL_ pay_ _ _1_2_3_4_€_ (_now_)!\n\n_ _ ok");
        check("deepseek-v3", "I_'LL_ pay_  _123_4_€_ (_now_)!\n\n_ _ ok");
        check("default", "I_'_LL_ pay_ _ _123_4_€_ _(_now_)!_\n\n _ ok");
    }

    #[test]
    fn every_name_builds_and_is_listed_once() {
        let mut all: Vec<&str> = names().collect();
        for name in &all {
            find(name).unwrap().by_library().unwrap();
        }
        let count = all.len();
        all.sort_unstable();
        all.dedup();
        assert_eq!(all.len(), count);
    }

    #[test]
    fn an_unknown_name_is_an_error_that_lists_the_known() {
        let error = find("gemma4").map(|_| ()).unwrap_err().to_string();
        assert!(error.contains("`gemma4`") && error.contains("llama-bpe"), "{error}");
    }
}
