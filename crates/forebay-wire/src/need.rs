//! What a request asks for beyond text in and text out.

use forebay_types::{Blame, Class, Classify, Code, Retry};

/// A feature that not everybody who may answer has.
///
/// Parsing only notes it. An upstream gets the body as it came and decides for itself; a stage that computes the answer
/// in this process returns it as the error where it lacks the feature, and never ignores it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("'{param}' is not supported here: {what}.")]
pub struct Need {
    /// The field that asks for it: `response_format`, `messages[0].content[1]`.
    pub param: String,
    /// What is missing where it is not supported, and what to do instead.
    pub what: &'static str,
}

impl Classify for Need {
    /// Nothing has been computed, and another replica or deployment may have it.
    fn class(&self) -> Class {
        Class::new(Code::NotSupported, Blame::Client).retry(Retry::Elsewhere)
    }

    fn param(&self) -> Option<&str> {
        Some(&self.param)
    }
}
