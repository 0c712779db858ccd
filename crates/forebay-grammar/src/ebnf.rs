//! Grammars in EBNF as xgrammar and llama.cpp (GBNF) take it, which is what vLLM's users write, to llguidance's Lark.
//!
//! ```text
//! root ::= "(" root ")" | number   # from here
//! number ::= [1-9] [0-9]{0,3}
//! ```
//!
//! The notations differ in what a word of the grammar is. EBNF has only characters, and takes any way to derive a text;
//! llguidance cuts the text into lexemes, and takes of those that may come the longest. So as much as can be is made one lexeme:
//! rules that don't lead back to themselves, those that do at their ends only (they repeat), and neighbours. A grammar
//! of only such rules, a regular one, means here exactly what it says. Of others output is always a text of the
//! grammar, but not every text of the grammar can come: in `root ::= "a" root "ab" | ""` an `a` before a `b`
//! belongs to `ab`.
//!
//! Source: `docs/defining_structures/ebnf_grammar.md` of mlc-ai/xgrammar and `grammars/README.md` of
//! ggml-org/llama.cpp. Rule options, macros, lookahead and tokens (`<...>`) are refused.

mod lark;
mod parse;

/// A JSON schema of a few hundred fields as xgrammar writes it.
const BYTES_MAX: usize = 256 * 1024;
/// Groups in groups. llguidance takes 30.
const GROUPS_MAX: usize = 20;
/// Rules and groups on the way from `root` to any other: llguidance goes it on the stack.
const STEPS_MAX: usize = 200;
/// Of one element.
const REPEATS_MAX: u32 = 10_000;

/// What can't be read, and where.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("line {line} of the EBNF grammar: {mistake}")]
pub struct EbnfError {
    /// From 1.
    pub line: usize,
    pub mistake: Mistake,
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Mistake {
    #[error("more than {BYTES_MAX} bytes")]
    TooLong,
    #[error("groups in groups, more than {GROUPS_MAX} deep")]
    TooManyGroups,
    #[error("rule `{0}` is more than {STEPS_MAX} steps from `root`")]
    TooManySteps(String),
    #[error("there is no rule `root`")]
    NoRoot,
    #[error("rule `{0}` is not defined")]
    UnknownRule(String),
    #[error("rule `{name}` is defined already, in line {first}")]
    DuplicateRule { name: String, first: usize },
    #[error("expected {expected}, found {found}")]
    Unexpected { expected: &'static str, found: String },
    #[error("{0} is not closed")]
    Unclosed(&'static str),
    #[error("`\\{0}` is no escape")]
    Escape(String),
    #[error("class `[]` has no characters")]
    EmptyClass,
    #[error("range `{from}-{to}` is the wrong way round")]
    Reversed { from: char, to: char },
    #[error("a repetition is `{{m}}`, `{{m,n}}` or `{{m,}}`, with m <= n <= {REPEATS_MAX}")]
    Repetition,
    #[error("a repetition of a repetition: put `(` and `)` around the first")]
    RepeatedTwice,
    #[error("{0} is not supported")]
    NotSupported(&'static str),
}

/// A part of a rule's body.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Node {
    Text(String),
    Class {
        negated: bool,
        ranges: Vec<(char, char)>,
    },
    /// By its number.
    Rule(usize),
    /// One behind the other; none is the empty text.
    Sequence(Vec<Node>),
    /// At least one.
    Choice(Vec<Node>),
    Repeat(Box<Node>, u32, Option<u32>),
}

#[derive(Debug)]
struct Rule {
    name: String,
    /// Of its definition.
    line: usize,
    body: Node,
}

/// All rules are defined, and their references are numbers of others.
#[derive(Debug)]
struct Grammar {
    rules: Vec<Rule>,
    root: usize,
}

/// Whether a grammar is in EBNF. In Lark, `::=` is found only within what is quoted, or in a comment.
pub(crate) fn is_ebnf(grammar: &str) -> bool {
    grammar
        .lines()
        .any(|line| line.split_once("::=").is_some_and(|(before, _)| !before.contains(['"', '/', '#'])))
}

/// The same grammar in Lark.
///
/// # Errors
/// What is wrong with it, or beyond a limit, with the line.
pub fn ebnf_to_lark(grammar: &str) -> Result<String, EbnfError> {
    lark::render_lark(parse::parse(grammar)?)
}

#[cfg(test)]
mod tests;
