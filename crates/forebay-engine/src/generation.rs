//! A model's own defaults for requests that leave a value open: `generation_config.json`, as vLLM uses it.

use std::path::{Path, PathBuf};

use forebay_wire::Sampling;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::small_file::{self, SmallFileError};

/// Where a model directory has its defaults.
const GENERATION_FILE: &str = "generation_config.json";
/// Real ones have a few hundred bytes.
const GENERATION_BYTES_MAX: u64 = 16 << 20;

/// Where a request's missing sampling values come from.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(from = "String", into = "String")]
#[schemars(with = "String")]
pub enum GenerationSource {
    /// `auto`: the model's `generation_config.json`, if it has one.
    #[default]
    Auto,
    /// `vllm`: OpenAI's defaults, temperature 1 and everything else off.
    Vllm,
    /// Another such file, or a directory that has one.
    Path(PathBuf),
}

impl From<String> for GenerationSource {
    fn from(text: String) -> Self {
        match text.as_str() {
            "auto" => Self::Auto,
            "vllm" => Self::Vllm,
            _ => Self::Path(text.into()),
        }
    }
}

impl From<GenerationSource> for String {
    fn from(source: GenerationSource) -> Self {
        match source {
            GenerationSource::Auto => "auto".to_owned(),
            GenerationSource::Vllm => "vllm".to_owned(),
            // It was one.
            GenerationSource::Path(path) => path.to_string_lossy().into_owned(),
        }
    }
}

/// What a request gets where it has no value of its own.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub struct GenerationDefaults {
    /// From 0 (greedy) to 2.
    pub temperature: Option<f32>,
    /// Above 0, up to 1, which is off.
    #[serde(alias = "top_p")]
    pub top_p: Option<f32>,
    /// 0 and -1 are off.
    #[serde(alias = "top_k")]
    pub top_k: Option<i32>,
    /// From 0, which is off, to 1.
    #[serde(alias = "min_p")]
    pub min_p: Option<f32>,
    /// Above 0; 1 is off.
    #[serde(alias = "repetition_penalty")]
    pub repetition_penalty: Option<f32>,
    /// Most tokens of any answer, also where a request asks for more.
    #[serde(alias = "max_new_tokens")]
    pub max_new_tokens: Option<u32>,
}

/// Why a model's defaults can't be used.
#[derive(Debug, thiserror::Error)]
pub enum GenerationError {
    #[error("the file with them can't be read")]
    Read(#[from] SmallFileError),
    #[error("{} is not as it should be", path.display())]
    Json { path: PathBuf, source: serde_json::Error },
    #[error("`{field}` is {value} in {}; {expected} expected", path.display())]
    Range { path: PathBuf, field: &'static str, value: f64, expected: &'static str },
}

/// `generation_config.json`: has more than we take, and names of its own.
#[derive(Deserialize)]
struct GenerationFile {
    temperature: Option<f32>,
    top_p: Option<f32>,
    top_k: Option<i32>,
    min_p: Option<f32>,
    repetition_penalty: Option<f32>,
    max_new_tokens: Option<u32>,
}

impl GenerationDefaults {
    /// Of a model in `directory` (a GGUF file has none), with `over` on top.
    pub(crate) fn of(
        directory: Option<&Path>,
        source: &GenerationSource,
        over: &Self,
    ) -> Result<Self, GenerationError> {
        let file = match (source, directory) {
            (GenerationSource::Auto, Some(directory)) => {
                let path = directory.join(GENERATION_FILE);
                match small_file::read_if_there(&path, GENERATION_BYTES_MAX)? {
                    Some(json) => Self::parse(&path, &json)?,
                    None => Self::default(),
                }
            }
            (GenerationSource::Path(path), _) => {
                let path = if path.is_dir() { path.join(GENERATION_FILE) } else { path.clone() };
                Self::parse(&path, &small_file::read(&path, GENERATION_BYTES_MAX)?)?
            }
            (GenerationSource::Auto | GenerationSource::Vllm, _) => Self::default(),
        };
        Ok(Self {
            temperature: over.temperature.or(file.temperature),
            top_p: over.top_p.or(file.top_p),
            top_k: over.top_k.or(file.top_k),
            min_p: over.min_p.or(file.min_p),
            repetition_penalty: over.repetition_penalty.or(file.repetition_penalty),
            max_new_tokens: over.max_new_tokens.or(file.max_new_tokens),
        })
    }

    fn parse(path: &Path, json: &[u8]) -> Result<Self, GenerationError> {
        let file: GenerationFile = serde_json::from_slice(json)
            .map_err(|source| GenerationError::Json { path: path.to_owned(), source })?;
        let defaults = Self {
            temperature: file.temperature,
            top_p: file.top_p,
            top_k: file.top_k,
            min_p: file.min_p,
            repetition_penalty: file.repetition_penalty,
            max_new_tokens: file.max_new_tokens,
        };
        match defaults.problem() {
            None => Ok(defaults),
            Some((field, value, expected)) => {
                Err(GenerationError::Range { path: path.to_owned(), field, value, expected })
            }
        }
    }

    /// The first value that no request could have: its name, itself, and what is expected.
    pub(crate) fn problem(&self) -> Option<(&'static str, f64, &'static str)> {
        /// Name, value, whether it is good, what is expected.
        type Check = (&'static str, Option<f64>, fn(f64) -> bool, &'static str);
        let float = |value: Option<f32>| value.map(f64::from);
        let checks: [Check; 6] = [
            ("temperature", float(self.temperature), |v| (0.0..=2.0).contains(&v), "0 to 2"),
            ("top-p", float(self.top_p), |v| v > 0.0 && v <= 1.0, "above 0, up to 1"),
            ("top-k", self.top_k.map(f64::from), |v| v >= -1.0, "-1 or more"),
            ("min-p", float(self.min_p), |v| (0.0..=1.0).contains(&v), "0 to 1"),
            (
                "repetition-penalty",
                float(self.repetition_penalty),
                |v| v > 0.0 && v.is_finite(),
                "a number above 0",
            ),
            ("max-new-tokens", self.max_new_tokens.map(f64::from), |v| v > 0.0, "1 or more"),
        ];
        checks.into_iter().find_map(|(field, value, is_good, expected)| {
            let value = value?;
            (!is_good(value)).then_some((field, value, expected))
        })
    }

    /// A request's values, with these where it left them open.
    pub(crate) fn fill(&self, given: &Sampling) -> Sampling {
        let open = given.left_open;
        let pick = |open: bool, own: Option<f32>, given: f32| own.filter(|_| open).unwrap_or(given);
        let top_k = self.top_k.map(|k| u32::try_from(k).unwrap_or(0)).filter(|_| open.top_k);
        Sampling {
            temperature: pick(open.temperature, self.temperature, given.temperature),
            top_p: pick(open.top_p, self.top_p, given.top_p),
            top_k: top_k.unwrap_or(given.top_k),
            min_p: pick(open.min_p, self.min_p, given.min_p),
            repetition_penalty: pick(
                open.repetition_penalty,
                self.repetition_penalty,
                given.repetition_penalty,
            ),
            ..given.clone()
        }
    }
}

#[cfg(test)]
mod tests {
    use forebay_wire::LeftOpen;

    use super::*;

    fn of(
        json: &str,
        source: GenerationSource,
        over: &GenerationDefaults,
    ) -> Result<GenerationDefaults, String> {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join(GENERATION_FILE), json).unwrap();
        GenerationDefaults::of(Some(dir.path()), &source, over)
            .map_err(|error| error.to_string().replace(&dir.path().display().to_string(), "DIR"))
    }

    const QWEN: &str = r#"{"bos_token_id": 1, "do_sample": true, "eos_token_id": [1, 2], "temperature": 0.6,
        "top_k": 20, "top_p": 0.95, "repetition_penalty": null, "transformers_version": "4.51.0"}"#;

    #[test]
    fn the_file_counts_unless_the_configuration_says_otherwise() {
        let none = GenerationDefaults::default();
        let file = GenerationDefaults {
            temperature: Some(0.6),
            top_k: Some(20),
            top_p: Some(0.95),
            ..GenerationDefaults::default()
        };
        assert_eq!(of(QWEN, GenerationSource::Auto, &none), Ok(file));
        assert_eq!(of(QWEN, GenerationSource::Vllm, &none), Ok(none));
        assert_eq!(GenerationDefaults::of(None, &GenerationSource::Auto, &none).unwrap(), none);
        // Another file, by its directory and by itself, whatever the model has.
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(GENERATION_FILE);
        let by = |path: &Path| {
            let source = GenerationSource::from(path.display().to_string());
            assert_eq!(GenerationSource::from(String::from(source.clone())), source);
            of("{}", source, &none)
        };
        assert_eq!(by(dir.path()), Err("the file with them can't be read".to_owned()));
        std::fs::write(&path, QWEN).unwrap();
        assert_eq!(by(dir.path()), Ok(file));
        assert_eq!(by(&path), Ok(file));
        let over = GenerationDefaults { top_k: Some(-1), max_new_tokens: Some(7), ..none };
        let both = GenerationDefaults { top_k: Some(-1), max_new_tokens: Some(7), ..file };
        assert_eq!(of(QWEN, GenerationSource::Auto, &over), Ok(both));
        assert_eq!(of(QWEN, GenerationSource::Vllm, &over), Ok(over));
    }

    #[test]
    fn a_value_that_no_request_could_have_is_named() {
        let check = |json: &str, expect: &str| {
            let error = of(json, GenerationSource::Auto, &GenerationDefaults::default()).unwrap_err();
            assert_eq!(error, expect, "{json}");
        };
        let range = |field: &str, value: &str, expected: &str| {
            format!("`{field}` is {value} in DIR/{GENERATION_FILE}; {expected} expected")
        };
        check(r#"{"temperature": 2.5}"#, &range("temperature", "2.5", "0 to 2"));
        check(r#"{"top_p": 0}"#, &range("top-p", "0", "above 0, up to 1"));
        check(r#"{"top_k": -2}"#, &range("top-k", "-2", "-1 or more"));
        check(r#"{"min_p": 1.5}"#, &range("min-p", "1.5", "0 to 1"));
        check(r#"{"repetition_penalty": 0}"#, &range("repetition-penalty", "0", "a number above 0"));
        check(r#"{"max_new_tokens": 0}"#, &range("max-new-tokens", "0", "1 or more"));
        check(r#"{"top_k": "20"}"#, &format!("DIR/{GENERATION_FILE} is not as it should be"));
    }

    #[test]
    fn only_what_a_request_leaves_open_is_filled() {
        let defaults = GenerationDefaults {
            temperature: Some(0.5),
            top_p: Some(0.25),
            top_k: Some(20),
            min_p: Some(0.125),
            repetition_penalty: Some(1.5),
            max_new_tokens: None,
        };
        let given = Sampling { temperature: 0.0, top_k: 0, seed: Some(3), ..Sampling::default() };
        assert_eq!(defaults.fill(&given), given, "a request that gives everything");
        let open = LeftOpen { top_p: true, top_k: true, min_p: true, ..LeftOpen::default() };
        let filled = defaults.fill(&Sampling { left_open: open, ..given.clone() });
        assert_eq!((filled.temperature, filled.top_p, filled.top_k, filled.min_p), (0.0, 0.25, 20, 0.125));
        assert_eq!((filled.repetition_penalty, filled.seed), (1.0, Some(3)));
        let off = GenerationDefaults { top_k: Some(-1), ..defaults };
        assert_eq!(off.fill(&Sampling { left_open: open, ..given }).top_k, 0);
    }
}
