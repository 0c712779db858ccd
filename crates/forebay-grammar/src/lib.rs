//! Output that is held to a language: which tokens may come next.
//!
//! [`Grammars`] is made once per vocabulary and compiles a [`Constraint`] to a [`Matcher`], one per choice. A matcher
//! gives the [`Mask`] of the tokens that may come next, and is told which came. The work is that of `llguidance`
//! (guidance-ai), which vLLM and SGLang use too: lexer by regex derivatives, Earley parser, masks over a token trie.
//!
//! Pure CPU work, without I/O. Compiling takes milliseconds to a second, a mask some 50 µs: neither belongs on the
//! thread that steps the model. There are limits on all of it; what goes beyond them is an error, not a long wait.

mod deep;
mod ebnf;
mod mask;

use std::sync::{Arc, Mutex, PoisonError};

use forebay_tokens::Tokenizer;
use forebay_types::{Blame, Class, Classify, Code, TokenId};
use forebay_wire::Constraint;
use llguidance::ParserFactory;
use llguidance::api::{ParserLimits, TopLevelGrammar};
use llguidance::toktrie::{ApproximateTokEnv, TokEnv, TokRxInfo, TokTrie};
use serde_json::{Value, json};

pub use ebnf::{EbnfError, Mistake, ebnf_to_lark};
pub use mask::Mask;

/// What a constraint may cost. Each bounds time or memory (50,000 units of lexer fuel are a millisecond, a lexer state is
/// 2 kB).
const LIMITS: fn() -> ParserLimits = || ParserLimits {
    max_items_in_row: 2000,
    initial_lexer_fuel: 1_000_000,
    step_lexer_fuel: 200_000,
    step_max_items: 50_000,
    max_lexer_states: 50_000,
    max_grammar_size: 200_000,
    precompute_large_lexemes: false,
    // They would quote the output.
    verbose_errors: false,
};
/// Compiled constraints that are kept: clients repeat the same few.
const KEPT_MAX: usize = 32;
/// Between the tokens of JSON. Bounded: a small model would else write line breaks until its tokens are used up.
const JSON_WHITESPACE: &str = r"(\n[ \t]{0,16}|[ \t]{1,16})";

/// Why output can't be held to a constraint.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum GrammarError {
    /// The client's schema, expression or grammar.
    #[error("the constraint can't be used: {0}")]
    Constraint(String),
    /// While output was matched: the constraint is too costly, or was left.
    #[error("the output could not be held to the constraint: {0}")]
    Matching(String),
    /// This vocabulary has no token that ends a text.
    #[error("the model has no end-of-text token, without which constrained output can't end")]
    NoEnd,
    #[error("the vocabulary can't be used for constrained output: {0}")]
    Vocabulary(String),
    #[error("there is no thread to compile the constraint on: {0}")]
    Thread(String),
}

impl Classify for GrammarError {
    fn class(&self) -> Class {
        match self {
            Self::Constraint(_) | Self::Matching(_) => Class::new(Code::BadRequest, Blame::Client),
            Self::NoEnd => Class::new(Code::NotSupported, Blame::Client),
            Self::Vocabulary(_) | Self::Thread(_) => Class::new(Code::Internal, Blame::Us),
        }
    }
}

/// Compiles constraints for one vocabulary.
pub struct Grammars {
    factory: ParserFactory,
    ends: Arc<[TokenId]>,
    /// Fresh matchers, the latest last.
    kept: Mutex<Vec<(Constraint, Matcher)>>,
}

impl Grammars {
    /// Builds the trie of the vocabulary: 50 to 200 ms.
    pub fn new(tokenizer: &Tokenizer) -> Result<Self, GrammarError> {
        let ends: Arc<[TokenId]> = tokenizer.eog().into();
        let &end = ends.first().ok_or(GrammarError::NoEnd)?;
        let words: Vec<Vec<u8>> =
            (0..tokenizer.vocab_size() as TokenId).map(|id| word(tokenizer, id)).collect();
        let info = TokRxInfo::new(words.len() as u32, end);
        let env: TokEnv = Arc::new(ApproximateTokEnv::new(TokTrie::from(&info, &words)));
        let mut factory =
            ParserFactory::new_simple(&env).map_err(|e| GrammarError::Vocabulary(e.to_string()))?;
        *factory.limits_mut() = LIMITS();
        factory.quiet();
        Ok(Self { factory, ends, kept: Mutex::default() })
    }

    /// A matcher at its beginning.
    ///
    /// # Errors
    /// `Constraint` with what is wrong with the client's schema, expression or grammar.
    pub fn compile(&self, constraint: &Constraint) -> Result<Matcher, GrammarError> {
        match constraint {
            Constraint::Grammar(grammar) if ebnf::is_ebnf(grammar) => {
                self.compile_lark(ebnf_to_lark(grammar).map_err(|e| GrammarError::Constraint(reason(&e)))?)
            }
            _ => self.compile_new(constraint, false),
        }
    }

    /// A grammar in Lark's notation that was made here. The client has its part in it: errors are as those of
    /// [`compile`](Self::compile).
    pub fn compile_lark(&self, grammar: String) -> Result<Matcher, GrammarError> {
        self.compile_new(&Constraint::Grammar(grammar), true)
    }

    /// `ours`: its rules are no client's.
    fn compile_new(&self, constraint: &Constraint, ours: bool) -> Result<Matcher, GrammarError> {
        if let Some(kept) = self.recall(constraint) {
            return Ok(kept);
        }
        let levels = deep::levels(constraint, ours);
        if levels > deep::LEVELS_MAX {
            let most = deep::LEVELS_MAX;
            let told = format!("it has {levels} rules, references and brackets, the limit is {most}");
            return Err(GrammarError::Constraint(told));
        }
        let inner = deep::run(levels, || {
            let refuse = |e: &dyn std::fmt::Display| GrammarError::Constraint(reason(&e));
            let parser = self.factory.create_parser(grammar(constraint)?).map_err(|e| refuse(&e))?;
            let mut inner = Box::new(llguidance::Matcher::new(Ok(parser)));
            // The first mask finds what the compiler leaves for later.
            inner.compute_mask().map_err(|e| refuse(&e))?;
            Ok(inner)
        });
        let inner = inner.map_err(|e| GrammarError::Thread(e.to_string()))??;
        let matcher = Matcher { inner, ends: Arc::clone(&self.ends) };
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        if kept.len() >= KEPT_MAX {
            kept.remove(0);
        }
        kept.push((constraint.clone(), matcher.fork()));
        Ok(matcher)
    }

    fn recall(&self, constraint: &Constraint) -> Option<Matcher> {
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        let at = kept.iter().position(|(known, _)| known == constraint)?;
        let found = kept.remove(at);
        let matcher = found.1.fork();
        kept.push(found);
        Some(matcher)
    }
}

impl std::fmt::Debug for Grammars {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Grammars").field("ends", &self.ends).finish_non_exhaustive()
    }
}

/// Where one choice stands in its constraint.
pub struct Matcher {
    inner: Box<llguidance::Matcher>,
    ends: Arc<[TokenId]>,
}

impl Matcher {
    /// Another one in the same state, sharing nothing that changes.
    pub fn fork(&self) -> Self {
        Self { inner: Box::new(self.inner.deep_clone()), ends: Arc::clone(&self.ends) }
    }

    /// The tokens that may come next. Where the text may end here, every token that ends a text is among them; where it
    /// must, they are the only ones.
    pub fn mask(&mut self) -> Result<Mask, GrammarError> {
        let found = self.inner.compute_mask_or_eos().map_err(|e| GrammarError::Matching(reason(&e)))?;
        let mut mask = Mask::from_words(found.as_slice().to_vec());
        let may_end = self.ends.iter().any(|&end| mask.allows(end));
        for &end in self.ends.iter().filter(|_| may_end) {
            mask.allow(end);
        }
        Ok(mask)
    }

    /// Goes on behind a token that [`mask`](Self::mask) allowed and that does not end the text.
    pub fn accept(&mut self, token: TokenId) -> Result<(), GrammarError> {
        self.inner.consume_token(token).map_err(|e| GrammarError::Matching(reason(&e)))
    }
}

impl std::fmt::Debug for Matcher {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Matcher")
    }
}

/// A token as the trie has it. Those that are no text get a byte in front that no text has.
fn word(tokenizer: &Tokenizer, id: TokenId) -> Vec<u8> {
    if !tokenizer.is_special(id) && !tokenizer.is_eog(id) {
        return tokenizer.token_bytes(id).to_vec();
    }
    let mut word = vec![TokTrie::SPECIAL_TOKEN_MARKER];
    word.extend_from_slice(format!("<{id}>").as_bytes());
    word
}

fn grammar(constraint: &Constraint) -> Result<TopLevelGrammar, GrammarError> {
    Ok(match constraint {
        Constraint::JsonObject => {
            TopLevelGrammar::from_json_schema(with_whitespace(json!({"type": "object"}))?)
        }
        Constraint::JsonSchema(schema) => TopLevelGrammar::from_json_schema(with_whitespace(schema.clone())?),
        Constraint::Regex(regex) => TopLevelGrammar::from_regex(regex),
        Constraint::Choice(choices) => {
            let strings: Vec<String> = choices.iter().map(|choice| json!(choice).to_string()).collect();
            TopLevelGrammar::from_lark(format!("start: {}", strings.join(" | ")))
        }
        Constraint::Grammar(grammar) => TopLevelGrammar::from_lark(grammar.clone()),
    })
}

/// The schema with our whitespace, unless it names its own.
fn with_whitespace(schema: Value) -> Result<Value, GrammarError> {
    let mut fields = match schema {
        Value::Object(fields) => fields,
        // A schema of JSON's two other kinds: anything, and nothing.
        Value::Bool(true) => serde_json::Map::new(),
        _ => return Err(GrammarError::Constraint("a JSON schema is an object".to_owned())),
    };
    let own = fields.entry("x-guidance").or_insert_with(|| json!({}));
    if let Value::Object(own) = own
        && !own.contains_key("whitespace_flexible")
        && !own.contains_key("whitespace_pattern")
    {
        own.insert("whitespace_pattern".to_owned(), JSON_WHITESPACE.into());
    }
    Ok(Value::Object(fields))
}

/// What llguidance says is wrong, on one line: a regular expression's mistake is told in several.
fn reason(error: &impl std::fmt::Display) -> String {
    const CHARS_MAX: usize = 300;
    let text = error.to_string();
    if text.contains("NoExtensionBias") {
        return "no text matches it".to_owned();
    }
    let words: Vec<&str> = text.split_whitespace().collect();
    words.join(" ").chars().take(CHARS_MAX).collect()
}

#[cfg(test)]
mod tests;
