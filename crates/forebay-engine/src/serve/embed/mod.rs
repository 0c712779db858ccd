//! Embeddings: an encoder behind the same stage as a generating engine.
//!
//! Texts are tokenized and checked here, computed in batches on a thread of its own, and rendered here. A request that is
//! dropped is out of the next batch.

mod abort;
mod queue;
mod run;
#[cfg(test)]
mod tests;
mod text;

use std::borrow::Cow;
use std::path::Path;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use forebay_flow::{Flow, Placed, PromptIds, Reply, ReplyForm, Stage};
use forebay_kernels::{Isa, Pool};
use forebay_observe::Layer;
use forebay_tokens::TextModel;
use forebay_types::{Blame, Class, Code, Fault, ModelName, RequestId, Retry, TokenId, Usage};
use forebay_wire::{Api, Ask, Chunk, Embed, EmbeddingsHead, Prompt, TokenizeInput, render_embeddings};
use tokio::sync::{mpsc, oneshot};

use super::answers::Answers;
use super::engine::{INBOX_MAX, overloaded};
use super::events::stopped;
use super::layout::cores;
use super::memory::check_room;
use super::off_thread::OffThread;
use super::watchdog::Watchdog;
use super::{Aborted, EngineDeps, StartError, prompt, tokenizer_info};
use crate::config::EngineConfig;
use crate::exec::{BertEncoder, Encoder};
use crate::metrics::ModelMetrics;
use crate::model::{EncoderError, EncoderSpec};
use crate::safetensors::Directory;
use abort::Open;
use run::{Limits, Loop, Submission};

/// Bytes of text that can become one token, to refuse what can't fit without tokenizing it: a word of up to 100
/// characters may be a single unknown one.
const TOKEN_BYTES_MAX: usize = 400;
/// Numbers that are rendered on an I/O thread: about 100 µs.
const INLINE_NUMBERS_MAX: usize = 2048;

/// A running embedding engine. Dropping it ends its thread once all requests are done.
pub struct EmbeddingEngine {
    model: ModelName,
    text: TextModel,
    spec: EncoderSpec,
    /// Tokens of a text at most.
    model_len: u32,
    inbox: mpsc::Sender<Submission>,
    open: Open,
    answers: Answers,
    /// The answer of `/tokenizer_info`, where it is on.
    tokenizer_info: Option<Bytes>,
    off_thread: OffThread,
    request_timeout: Duration,
    load_time: Duration,
    summary: String,
    watchdog: Watchdog,
    thread: JoinHandle<()>,
}

impl EmbeddingEngine {
    /// Loads a directory and starts the thread. Blocks until the model is ready.
    ///
    /// Of the configuration, what is about a KV cache, prefixes and steps of decoding means nothing here.
    pub fn start(
        config: &EngineConfig,
        directory: &Path,
        model: ModelName,
        deps: EngineDeps<'_>,
    ) -> Result<Self, StartError> {
        let begun = Instant::now();
        let (spec, model_len) = Self::plan(config, directory)?;
        let cannot =
            |source: EncoderError| StartError::Encoder { path: directory.into(), source: source.into() };
        let files = Directory::open(directory).map_err(|source| cannot(source.into()))?;
        // Rows that fill up a tile make packed weights a little larger than the files.
        check_room(files.bytes() + files.bytes() / 64, 0)?;
        let text = text::read(directory)?;
        let threads = config.threads.map_or_else(cores, |n| n as usize);
        let isa = deps.isa.unwrap_or_else(Isa::detect);
        let encoder = BertEncoder::open(directory, isa, Arc::new(Pool::new(threads))).map_err(cannot)?;
        let summary = format!(
            "{}, encoder with {} layers, vectors of {}, {threads} threads, {}",
            directory.display(),
            spec.layers,
            spec.dim,
            isa.as_str(),
        );
        let metrics = deps.metrics.for_encoder(model.as_str(), model_len);
        let tokenizer_info = config
            .enable_tokenizer_info_endpoint
            .then(|| tokenizer_info::render(&text, Some(directory), model_len))
            .transpose()
            .map_err(|source| StartError::HfText { path: directory.into(), source: Box::new(source) })?;
        let engine = Self::run(config, model, text, spec, encoder, metrics, begun, summary)?;
        Ok(Self { tokenizer_info, ..engine })
    }

    /// Whether [`EmbeddingEngine::start`] would take this configuration for this directory. Reads its JSON files only.
    pub fn inspect(config: &EngineConfig, directory: &Path) -> Result<(), StartError> {
        Self::plan(config, directory).map(|_| ())
    }

    fn plan(config: &EngineConfig, directory: &Path) -> Result<(EncoderSpec, u32), StartError> {
        if let Some(problem) = config.problems().into_iter().next() {
            return Err(problem.into());
        }
        for (key, is_set) in [
            ("engine.tensor-parallel-size", config.tensor_parallel_size > 1),
            ("engine.pipeline-parallel-size", config.pipeline_parallel_size > 1),
            ("engine.kv-events", config.kv_events.is_some()),
        ] {
            if is_set {
                return Err(StartError::NotForEncoders { key });
            }
        }
        let spec = EncoderSpec::read(directory)
            .map_err(|source| StartError::Encoder { path: directory.into(), source: source.into() })?;
        match config.max_model_len {
            Some(asked) if asked as usize > spec.tokens_max => {
                Err(StartError::ModelLen { asked, trained: spec.tokens_max })
            }
            asked => {
                let model_len = asked.unwrap_or(spec.tokens_max as u32);
                Ok((spec, model_len))
            }
        }
    }

    #[allow(clippy::too_many_arguments)] // The two ways to start (real and fake encoder) meet here.
    fn run<E: Encoder + 'static>(
        config: &EngineConfig,
        model: ModelName,
        text: TextModel,
        spec: EncoderSpec,
        encoder: E,
        metrics: ModelMetrics,
        begun: Instant,
        summary: String,
    ) -> Result<Self, StartError> {
        let (inbox, submissions) = mpsc::channel(INBOX_MAX);
        let limits = Limits {
            batch_tokens: config.max_num_batched_tokens as usize,
            batch_inputs: config.max_num_seqs as usize,
            waiting_requests: config.max_num_queued_reqs,
            waiting_tokens: u64::from(config.max_num_queued_tokens),
            request_timeout: config.request_timeout.get(),
        };
        let watchdog = Watchdog::start(config.watchdog, model.as_str(), metrics.stuck_steps())
            .map_err(StartError::Thread)?;
        let work = Loop { encoder, inbox: submissions, limits, metrics, heartbeat: watchdog.heartbeat() };
        let thread = std::thread::Builder::new()
            .name("forebay-embed".into())
            .spawn(move || work.run())
            .map_err(StartError::Thread)?;
        Ok(Self {
            answers: Answers::new(config, &model),
            model,
            text,
            model_len: config.max_model_len.unwrap_or(spec.tokens_max as u32),
            spec,
            inbox,
            open: Open::default(),
            tokenizer_info: None,
            off_thread: OffThread::new(),
            request_timeout: config.request_timeout.get(),
            load_time: begun.elapsed(),
            summary,
            watchdog,
            thread,
        })
    }

    /// Takes nothing more, finishes every request that it has, and gives its memory back. Blocks until then.
    pub fn stop(self) {
        let Self { inbox, thread, .. } = self;
        drop(inbox);
        if thread.join().is_err() {
            tracing::error!("the embedding engine's thread had panicked");
        }
    }

    /// Ends requests with an error. An id that no request has is ignored, as it may have ended a moment ago.
    pub fn abort(&self, which: &Aborted) {
        self.open.end(which);
    }

    pub fn model(&self) -> &ModelName {
        &self.model
    }

    /// Tokens of one text at most, special ones included.
    pub fn model_len(&self) -> u32 {
        self.model_len
    }

    pub fn load_time(&self) -> Duration {
        self.load_time
    }

    /// One line for people.
    pub fn summary(&self) -> &str {
        &self.summary
    }

    /// Whether a batch takes longer than `engine.watchdog`. It may still come back.
    pub fn is_stuck(&self) -> bool {
        self.watchdog.sees_stuck_step()
    }

    /// False once the thread has died: no request can succeed any more.
    pub fn is_alive(&self) -> bool {
        !self.inbox.is_closed()
    }

    /// Refuses texts that can't fit, by their size alone. One that passes may still be too long.
    pub fn fits(&self, input: &Prompt) -> Result<(), Fault> {
        let (bytes, tokens) = (input.bytes_max(), self.model_len);
        let limit = (tokens as usize).saturating_mul(TOKEN_BYTES_MAX);
        if bytes <= limit {
            return Ok(());
        }
        let message = format!(
            "This model's maximum context length is {tokens} tokens, which is {limit} bytes of text at most. However, you \
             requested {bytes} bytes in the input for embedding generation. Please reduce the length of the input."
        );
        Err(Fault::new(Class::new(Code::ContextLengthExceeded, Blame::Client), message).param("input"))
    }

    /// The ids of each text, special ones around it. Pure CPU work.
    pub fn encode(&self, call: &Embed) -> Result<PromptIds, Fault> {
        text::encode(&self.text, self.spec.lower_case, &call.input, call.add_special_tokens)
    }

    async fn embed(&self, flow: Flow<Placed>, call: &Embed) -> Result<Reply, Fault> {
        let arrived = Instant::now();
        let Flow { origin, stage } = flow;
        if let Some(need) = call.needs.first() {
            return Err(need.clone().into());
        }
        let length = self.length(call)?;
        let ids = match stage.ids {
            ids @ PromptIds::Exact { tokenizer, .. } if tokenizer == self.text.tokenizer().id() => ids,
            _ => {
                if call.truncate_prompt_tokens.is_none() {
                    self.fits(&call.input)?;
                }
                let (text, lower_case) = (self.text.clone(), self.spec.lower_case);
                let (input, special) = (call.input.clone(), call.add_special_tokens);
                self.off_thread.run(move || text::encode(&text, lower_case, &input, special)).await?
            }
        };
        let PromptIds::Exact { prompts, .. } = ids else {
            return Err(Fault::internal("the engine's own encoder only estimated"));
        };
        let inputs = self.check(call, prompts)?;
        let tokens: usize = inputs.iter().map(|ids| ids.len()).sum();
        let count = inputs.len();

        let own_id = call.request_id.as_deref().map(RequestId::from);
        let (_listed, ended) = self.open.enter(origin.id.clone(), own_id.clone());
        let (answer, answered) = oneshot::channel();
        let submission = Submission {
            inputs,
            priority: call.priority,
            tenant: stage.caller.consumer.clone(),
            arrived,
            deadline: arrived + self.request_timeout,
            answer,
        };
        self.inbox.try_send(submission).map_err(|error| match error {
            mpsc::error::TrySendError::Full(_) => overloaded(),
            mpsc::error::TrySendError::Closed(_) => stopped(),
        })?;
        let vectors = tokio::select! {
            answered = answered => answered.map_err(|_| stopped())??,
            // The loop sees that nobody waits for the answer any more.
            Ok(aborted) = ended => return Err(aborted),
        };
        origin.trace.note(Layer::Engine, "embed", arrived, format!("{count} texts, {tokens} tokens"));

        let usage = Usage { prompt_tokens: tokens as u32, ..Usage::default() };
        let normalize = call.normalize.unwrap_or(self.spec.normalize);
        let (dim, id, model, format) = (
            self.spec.dim,
            own_id.unwrap_or_else(|| origin.id.clone()),
            self.answers.name(&call.model).clone(),
            call.format,
        );
        let render = move || {
            let vectors: Vec<Vec<f32>> =
                vectors.chunks_exact(dim).map(|vector| finished(&vector[..length], normalize)).collect();
            let created_unix =
                SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
            let head = EmbeddingsHead { id: id.as_str(), created_unix, model: &model, format };
            Ok(render_embeddings(&head, &vectors, &usage))
        };
        let bytes = match count * length {
            0..=INLINE_NUMBERS_MAX => render()?,
            _ => self.off_thread.run(render).await?,
        };
        let chunk = Chunk::Verbatim { bytes, usage: Some(usage), deltas: 0 };
        Ok(Reply::new(ReplyForm::Json, Box::pin(futures_util::stream::iter([Ok(chunk)]))))
    }

    /// Numbers of each vector in the answer.
    fn length(&self, call: &Embed) -> Result<usize, Fault> {
        let dim = self.spec.dim;
        let Some(asked) = call.dimensions else { return Ok(dim) };
        let model = &call.model;
        // vLLM's words.
        let message = match &self.spec.matryoshka {
            None => format!(
                "Model \"{model}\" does not support matryoshka representation, changing output dimensions will lead to poor \
                 results."
            ),
            Some(supported) if !supported.is_empty() && !supported.contains(&asked) => format!(
                "Model \"{model}\" only supports {supported:?} matryoshka dimensions, use other output dimensions will lead \
                 to poor results."
            ),
            Some(_) if asked as usize > dim => {
                format!("dimensions is {asked}, but the vectors of \"{model}\" have {dim}")
            }
            Some(_) => return Ok(asked as usize),
        };
        Err(Fault::bad_request(message).param("dimensions"))
    }

    /// Cuts each text where the call wants it, and checks it against the model.
    fn check(&self, call: &Embed, prompts: Vec<Arc<[TokenId]>>) -> Result<Vec<Arc<[TokenId]>>, Fault> {
        let limit = self.model_len;
        let cut = match call.truncate_prompt_tokens {
            None => None,
            Some(-1) => Some(limit as usize),
            Some(0) => {
                let message =
                    "truncate_prompt_tokens is 0, which leaves nothing; it must be -1 or at least 1";
                return Err(Fault::bad_request(message).param("truncate_prompt_tokens"));
            }
            Some(asked) if asked as u32 > limit => {
                let message = format!(
                    "truncate_prompt_tokens value ({asked}) is greater than max_model_len ({limit}). Please request a \
                     smaller truncation size."
                );
                return Err(Fault::bad_request(message).param("truncate_prompt_tokens"));
            }
            Some(asked) => Some(asked as usize),
        };
        let vocab = self.spec.vocab_size;
        let keep = match (&call.input, call.add_special_tokens) {
            (Prompt::Text(_), true) => self.text.tokenizer().suffix(),
            _ => &[],
        };
        let check = |ids: Arc<[TokenId]>| {
            if let Some(id) = ids.iter().find(|&&id| id as usize >= vocab) {
                let message = format!("token id {id} is out of the vocabulary of {vocab} tokens");
                return Err(Fault::bad_request(message).param("input"));
            }
            let ids = match cut {
                Some(cut) if ids.len() > cut => text::truncated(&ids, cut, keep),
                _ => ids,
            };
            if ids.is_empty() {
                return Err(Fault::bad_request("the input is empty: it has no tokens").param("input"));
            }
            if ids.len() > limit as usize {
                let tokens = ids.len();
                let message = format!(
                    "This model's maximum context length is {limit} tokens. However, you requested {tokens} tokens in the \
                     input for embedding generation. Please reduce the length of the input."
                );
                let class = Class::new(Code::ContextLengthExceeded, Blame::Client);
                return Err(Fault::new(class, message).param("input"));
            }
            Ok(ids)
        };
        prompts.into_iter().map(check).collect()
    }
}

/// A vector as the client gets it. Cut before it gets its length, as vLLM does.
fn finished(vector: &[f32], normalize: bool) -> Vec<f32> {
    let mut vector = vector.to_vec();
    if normalize {
        let length = vector.iter().map(|x| x * x).sum::<f32>().sqrt().max(1e-12);
        vector.iter_mut().for_each(|x| *x /= length);
    }
    vector
}

/// In vLLM's words. Another deployment of the same name may be of the right kind.
pub(super) fn not_this_api(name: &str) -> Fault {
    let class = Class::new(Code::NotSupported, Blame::Client).retry(Retry::Elsewhere);
    Fault::new(class, format!("The model does not support {name} API"))
}

impl Stage<Placed> for EmbeddingEngine {
    async fn call(&self, flow: Flow<Placed>) -> Result<Reply, Fault> {
        match &flow.stage.ask {
            Ask::Embed(call) => {
                let call = Arc::clone(call);
                self.embed(flow, &call).await
            }
            Ask::Generate(call) | Ask::Render(call) => Err(not_this_api(match call.api {
                Api::ChatCompletions => "Chat Completions",
                Api::Completions => "Completions",
                Api::Tokens => "Generate Tokens",
            })),
            Ask::Tokenize(call) => {
                let mut call = call.clone();
                match &mut call.input {
                    TokenizeInput::Prompt(prompt) => {
                        self.fits(&Prompt::Text(vec![prompt.clone()]))?;
                        if let Cow::Owned(lower) = text::cased(prompt, self.spec.lower_case) {
                            *prompt = lower;
                        }
                    }
                    TokenizeInput::Messages { .. } => {
                        let message = "this model has no chat template; send the text as 'prompt'";
                        return Err(Fault::bad_request(message).param("messages"));
                    }
                }
                let (text, len) = (self.text.clone(), self.model_len);
                self.off_thread.run(move || prompt::tokenize(&text, &call, len)).await
            }
            Ask::Detokenize(call) => {
                let (text, call) = (self.text.clone(), call.clone());
                self.off_thread.run(move || prompt::detokenize(&text, &call)).await
            }
            Ask::TokenizerInfo => tokenizer_info::answer(self.tokenizer_info.as_ref()),
            Ask::ListModels | Ask::GetModel(_) => Err(Fault::internal("model listings are the proxy's")),
        }
    }
}
