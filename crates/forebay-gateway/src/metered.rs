//! A reply's chunks, passed on as they come and counted.

use std::pin::Pin;
use std::task::{Context, Poll, ready};

use forebay_flow::{ChunkStream, ReplyForm};
use forebay_types::Fault;
use forebay_wire::Chunk;
use futures_util::Stream;

use crate::account::Account;
use crate::tally::Seen;

/// Settles and audits when the reply is whole, fails or ends, or when it is dropped: the account sees to the last.
pub(crate) struct Metered {
    /// `None` once it has ended, so that the layers below are let go at once.
    chunks: Option<ChunkStream>,
    form: ReplyForm,
    account: Account,
}

impl Metered {
    pub(crate) fn new(chunks: ChunkStream, form: ReplyForm, account: Account) -> Self {
        Self { chunks: Some(chunks), form, account }
    }
}

impl Stream for Metered {
    type Item = Result<Chunk, Fault>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let Some(chunks) = &mut self.chunks else { return Poll::Ready(None) };
        let item = ready!(chunks.as_mut().poll_next(cx));
        match &item {
            Some(Ok(chunk)) => {
                let form = self.form;
                if self.account.see(chunk, form) == Seen::Whole {
                    self.account.close_whole();
                }
            }
            Some(Err(fault)) => {
                self.account.close_failed(fault);
                self.chunks = None;
            }
            None => {
                self.account.close_ended();
                self.chunks = None;
            }
        }
        Poll::Ready(item)
    }
}
