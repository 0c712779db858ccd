//! Counts what a reply uses while it passes.

use forebay_flow::{PromptIds, ReplyForm};
use forebay_types::Usage;
use forebay_wire::{Chunk, Event};

/// Bytes of JSON per completion token, where a body names no usage: the usual figure for English text, with nothing
/// taken off for the JSON around it, so that the estimate is rather too high.
const BODY_BYTES_PER_TOKEN: usize = 4;

/// What one generation used, as far as it is known.
#[derive(Debug, Default)]
pub(crate) struct Tally {
    prompt_tokens: u32,
    prompt_is_exact: bool,
    cached_tokens: u32,
    completion_tokens: u32,
    completion_is_estimate: bool,
    /// Events of an engine: their stream says itself when it is whole.
    has_events: bool,
    /// As the engine or the upstream reported it. The last one counts, never the sum: some send it in every chunk,
    /// growing.
    reported: Option<Usage>,
}

/// Whether more is to come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Seen {
    More,
    /// The reply is whole, whatever happens to the connection now.
    Whole,
}

impl Tally {
    pub(crate) fn of_prompt(ids: &PromptIds) -> Self {
        let prompt_is_exact = matches!(ids, PromptIds::Exact { .. });
        Self { prompt_tokens: ids.tokens(), prompt_is_exact, ..Self::default() }
    }

    pub(crate) fn see(&mut self, chunk: &Chunk, form: ReplyForm) -> Seen {
        self.has_events |= matches!(chunk, Chunk::Event(_));
        match chunk {
            Chunk::Event(Event::Started { prompt_tokens, cached_tokens }) => {
                self.prompt_tokens = *prompt_tokens;
                self.cached_tokens = *cached_tokens;
                self.prompt_is_exact = true;
            }
            Chunk::Event(Event::Delta(delta)) => self.count(delta.tokens),
            Chunk::Event(Event::Prompt(_) | Event::Finished { .. }) => {}
            Chunk::Event(Event::Done { usage }) => {
                self.reported = Some(*usage);
                return Seen::Whole;
            }
            Chunk::Verbatim { bytes, usage, deltas } => {
                self.reported = usage.or(self.reported);
                // An upstream's deltas are pieces of text, nearly but not always one per token.
                self.completion_is_estimate |= *deltas > 0;
                self.count(*deltas);
                match form {
                    ReplyForm::Json if !bytes.is_empty() => {
                        if usage.is_none() && *deltas == 0 {
                            self.completion_is_estimate = true;
                            self.count(bytes.len().div_ceil(BODY_BYTES_PER_TOKEN) as u32);
                        }
                        return Seen::Whole;
                    }
                    ReplyForm::Sse if is_done(bytes) => return Seen::Whole,
                    ReplyForm::Json | ReplyForm::Sse => {}
                }
            }
        }
        Seen::More
    }

    fn count(&mut self, tokens: u32) {
        self.completion_tokens = self.completion_tokens.saturating_add(tokens);
    }

    /// Whether chunks that just end now were cut. An upstream that fails makes an error, and some end without `[DONE]`;
    /// an engine in this process never ends without [`Event::Done`].
    pub(crate) fn is_cut_by_ending(&self) -> bool {
        self.has_events
    }

    /// What was used, and whether that is an estimate.
    pub(crate) fn usage(&self) -> (Usage, bool) {
        let counted = Usage {
            prompt_tokens: self.prompt_tokens,
            completion_tokens: self.completion_tokens,
            cached_tokens: self.cached_tokens,
            // Only who makes the reasoning counts it, and says so in the end.
            reasoning_tokens: 0,
        };
        match self.reported {
            Some(usage) => (usage, false),
            None => (counted, !self.prompt_is_exact || self.completion_is_estimate),
        }
    }
}

/// `data: [DONE]` with its line ends.
fn is_done(frame: &[u8]) -> bool {
    frame.trim_ascii().strip_prefix(b"data:").is_some_and(|data| data.trim_ascii_start() == b"[DONE]")
}

#[cfg(test)]
mod tests {
    use super::*;
    use bytes::Bytes;
    use forebay_wire::Delta;

    fn usage(prompt: u32, completion: u32, cached: u32) -> Usage {
        Usage {
            prompt_tokens: prompt,
            completion_tokens: completion,
            cached_tokens: cached,
            ..Usage::default()
        }
    }

    fn verbatim(bytes: &'static str, usage: Option<Usage>, deltas: u32) -> Chunk {
        Chunk::Verbatim { bytes: Bytes::from_static(bytes.as_bytes()), usage, deltas }
    }

    fn delta(tokens: u32) -> Chunk {
        Chunk::Event(Event::Delta(Delta { tokens, ..Delta::default() }))
    }

    #[test]
    fn counts_until_usage_is_reported() {
        let check = |form, chunks: &[Chunk], expect: Usage, estimated: bool, last: Seen| {
            let mut tally = Tally::of_prompt(&PromptIds::Estimated { tokens: 10 });
            let seen = chunks.iter().map(|chunk| tally.see(chunk, form)).last().unwrap_or(Seen::More);
            assert_eq!((tally.usage(), seen), ((expect, estimated), last), "{chunks:?}");
        };
        let started = || Chunk::Event(Event::Started { prompt_tokens: 12, cached_tokens: 8 });
        let done = |usage| Chunk::Event(Event::Done { usage });
        let sse = ReplyForm::Sse;
        check(sse, &[], usage(10, 0, 0), true, Seen::More);
        check(sse, &[started(), delta(1), delta(2)], usage(12, 3, 8), false, Seen::More);
        check(sse, &[started(), delta(1), done(usage(12, 2, 8))], usage(12, 2, 8), false, Seen::Whole);
        check(
            sse,
            &[verbatim("data: {}\n\n", None, 1), verbatim("data: {}\n\n", None, 1)],
            usage(10, 2, 0),
            true,
            Seen::More,
        );
        check(
            sse,
            &[
                verbatim("data: {}\n\n", Some(usage(9, 1, 0)), 1),
                verbatim("", Some(usage(9, 2, 4)), 0),
                verbatim("data: [DONE]\n\n", None, 0),
            ],
            usage(9, 2, 4),
            false,
            Seen::Whole,
        );
        let json = ReplyForm::Json;
        check(
            json,
            &[verbatim("{\"usage\":1}", Some(usage(9, 2, 0)), 0)],
            usage(9, 2, 0),
            false,
            Seen::Whole,
        );
        check(json, &[verbatim("12345678", None, 0)], usage(10, 2, 0), true, Seen::Whole);
        check(json, &[started(), delta(1), done(usage(12, 1, 0))], usage(12, 1, 0), false, Seen::Whole);
    }

    #[test]
    fn an_exact_prompt_stays_exact() {
        let ids = PromptIds::Exact {
            tokenizer: forebay_types::TokenizerId([0; 32]),
            prompts: vec![vec![1, 2].into(), vec![3].into()],
        };
        assert_eq!(Tally::of_prompt(&ids).usage(), (usage(3, 0, 0), false));
    }
}
