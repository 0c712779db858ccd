//! Constrained choices: the masks of their next tokens, made on a thread of their own.
//!
//! When a token of such a choice is known, the thread is told, and works while the step loop goes on and the model
//! computes the next logits. The step loop asks for the mask only before it samples that row.

use std::sync::mpsc;

use forebay_grammar::{GrammarError, Mask, Matcher};
use forebay_types::TokenId;

/// Where one choice stands in its constraint.
pub(crate) struct Constrained(State);

enum State {
    Here(Matcher, Mask),
    /// The thread has it.
    Away(mpsc::Receiver<Result<(Matcher, Mask), GrammarError>>),
    Failed(GrammarError),
}

/// The beginning of a constraint, which all choices of a request share.
pub(crate) struct Beginning(Matcher, Mask);

impl Beginning {
    /// Computes the first mask, so call it off the step thread.
    pub(crate) fn new(mut matcher: Matcher) -> Result<Self, GrammarError> {
        let mask = matcher.mask()?;
        Ok(Self(matcher, mask))
    }

    pub(crate) fn choice(&self) -> Constrained {
        Constrained(State::Here(self.0.fork(), self.1.clone()))
    }
}

impl Constrained {
    /// The tokens that may come next. Waits for the thread where it is not done.
    pub(crate) fn mask(&mut self) -> Result<Mask, GrammarError> {
        if let State::Away(answer) = &self.0 {
            let lost = GrammarError::Matching("the thread that follows constraints has ended".to_owned());
            self.0 = match answer.recv().unwrap_or(Err(lost)) {
                Ok((matcher, mask)) => State::Here(matcher, mask),
                Err(error) => State::Failed(error),
            };
        }
        match &self.0 {
            State::Here(_, mask) => Ok(mask.clone()),
            State::Failed(error) => Err(error.clone()),
            State::Away(_) => unreachable!("answered above"),
        }
    }
}

/// The thread that follows constraints; ends with this value.
pub(crate) struct MaskThread(mpsc::Sender<Work>);

struct Work {
    matcher: Matcher,
    token: TokenId,
    answer: mpsc::SyncSender<Result<(Matcher, Mask), GrammarError>>,
}

impl MaskThread {
    pub(crate) fn start() -> std::io::Result<Self> {
        // No more in it than constrained choices run: each has one piece of work at a time.
        let (sender, works) = mpsc::channel::<Work>();
        std::thread::Builder::new().name("forebay-grammar".into()).spawn(move || {
            for Work { mut matcher, token, answer } in works {
                let done = matcher.accept(token).and_then(|()| matcher.mask());
                // Nobody waits where the client has left.
                let _ = answer.send(done.map(|mask| (matcher, mask)));
            }
        })?;
        Ok(Self(sender))
    }

    /// Begins to work on what comes behind `token`. False where the thread has died: this choice fails, and another
    /// thread is to be started for the next.
    pub(crate) fn follow(&self, constrained: &mut Constrained, token: TokenId) -> bool {
        let (answer, receiver) = mpsc::sync_channel(1);
        let before = std::mem::replace(&mut constrained.0, State::Away(receiver));
        match before {
            State::Here(matcher, _) => self.0.send(Work { matcher, token, answer }).is_ok(),
            other => {
                constrained.0 = other;
                true
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use forebay_grammar::Grammars;
    use forebay_wire::Constraint;

    use super::*;
    use crate::serve::tests::text_model;

    #[test]
    fn who_follows_a_constraint_does_not_wait_for_its_mask() {
        let text = text_model();
        let grammars = Grammars::new(text.tokenizer()).expect("a vocabulary");
        let matcher = grammars.compile(&Constraint::Regex("ab[0-9]".into())).expect("a regular expression");
        let beginning = Beginning::new(matcher).expect("a first mask");
        // Ids are bytes.
        let ids = b"ab7".map(TokenId::from);
        let mut choice = beginning.choice();
        let thread = MaskThread::start().expect("a thread");
        assert!(choice.mask().expect("the first").allows(ids[0]));
        assert!(thread.follow(&mut choice, ids[0]));
        // The mask is made without anybody asking for it, and not by us.
        let State::Away(answer) = &choice.0 else { panic!("the mask was made before the call came back") };
        let (matcher, mask) = answer.recv().expect("the thread lives").expect("the token fits");
        assert!(mask.allows(ids[1]) && !mask.allows(ids[0]));
        choice.0 = State::Here(matcher, mask);
        assert!(thread.follow(&mut choice, ids[2]));
        assert!(choice.mask().is_err(), "a digit is no `b`");
    }
}
