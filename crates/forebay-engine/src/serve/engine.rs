//! The engine as the rest of the program sees it: a stage that turns a placed request into events.

use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use forebay_flow::{Flow, Placed, PromptIds, Reply, ReplyForm, Stage};
use forebay_grammar::{GrammarError, Grammars, Mask};
use forebay_kernels::{Isa, Pool};
use forebay_observe::{Layer, Trace};
use forebay_schedule::{Scheduler, SchedulerConfig};
use forebay_tokens::{StopMatcher, TextModel};
use forebay_types::{Blame, Class, Code, Fault, ModelName, Retry, TokenId, TokenizerId};
use forebay_wire::{Api, Ask, Chunk, Constraint, Event, Generate, Prompt, TokenizeInput};
use tokio::sync::{Semaphore, mpsc};

use super::KvSink;
use super::constrain::Beginning;
use super::memory::check_memory;
use super::prompt;
use super::step_loop::{LoopState, StepLoop};
use super::submission::{How, PromptAsk, Submission};
use super::text::{TextError, text_model};
use super::words::BadWords;
use crate::config::{EngineConfig, EngineConfigError};
use crate::exec::{BuildError, CpuExecutor, CpuOptions, Executor};
use crate::kv_events::{KvEventsError, Publisher};
use crate::metrics::{EngineMetrics, KvInfo};
use crate::model::{ModelFile, ModelSpec, OpenError, SpecError};

/// Submissions on their way to the step thread. It takes them between steps, so this bounds what arrives during one.
pub(super) const INBOX_MAX: usize = 1024;
/// Prompts (times choices) of one request: OpenAI's limit of `n`, and of a batch of prompts.
const CHOICES_MAX: usize = 2048;
/// `max_tokens` of the completions API where the request has none.
const COMPLETION_TOKENS_DEFAULT: u32 = 16;
/// Tells a client when to come back where the queue is full: about one long answer.
pub(super) const RETRY_AFTER: Duration = Duration::from_secs(2);

/// Why an engine could not be started.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    #[error(transparent)]
    Config(#[from] EngineConfigError),
    #[error(transparent)]
    Open(#[from] OpenError),
    #[error("the model in {} can't be served", path.display())]
    Spec { path: PathBuf, source: SpecError },
    #[error("the model in {} can't be served", path.display())]
    Text { path: PathBuf, source: TextError },
    #[error("the model in {} can't be loaded", path.display())]
    Build { path: PathBuf, source: BuildError },
    #[error(
        "`engine.kv-cache-memory` ({given}) is less than one block of this model: give it {needed} or more"
    )]
    KvTooSmall { given: forebay_config::ByteSize, needed: forebay_config::ByteSize },
    #[error(
        "`engine.max-model-len` is {asked}, but the model was trained for {trained} tokens; lower it or leave it out"
    )]
    ModelLen { asked: u32, trained: usize },
    #[error(
        "not enough memory: the model needs about {weights} and `engine.kv-cache-memory` is {kv}, but only {available} \
         is available; lower `engine.kv-cache-memory` or use a smaller model"
    )]
    Memory {
        weights: forebay_config::ByteSize,
        kv: forebay_config::ByteSize,
        available: forebay_config::ByteSize,
    },
    #[error(transparent)]
    KvEvents(#[from] KvEventsError),
    #[error("the engine's thread can't be started")]
    Thread(#[source] std::io::Error),
}

impl StartError {
    /// The configuration key that is at fault, or is closest to it.
    pub fn at(&self) -> &'static str {
        match self {
            Self::Open(_) | Self::Spec { .. } | Self::Text { .. } | Self::Build { .. } => "engine.model",
            Self::KvTooSmall { .. } | Self::Memory { .. } => "engine.kv-cache-memory",
            Self::ModelLen { .. } => "engine.max-model-len",
            Self::KvEvents(_) => "engine.kv-events",
            Self::Config(_) | Self::Thread(_) => "engine",
        }
    }
}

/// What an engine needs beside its configuration.
pub struct EngineDeps<'a> {
    pub metrics: &'a EngineMetrics,
    /// Gets the KV events; `None` where nobody indexes the cache.
    pub kv_sink: Option<KvSink>,
    /// Instructions to use; the best that the machine has where absent.
    pub isa: Option<Isa>,
}

/// A running engine. Dropping it ends its thread once all requests are done.
pub struct Engine {
    model: ModelName,
    text: TextModel,
    inbox: mpsc::Sender<Submission>,
    /// Made by the first request that needs it.
    grammars: Arc<OnceLock<Result<Grammars, GrammarError>>>,
    /// What this engine tokenizes itself, at a time: half of the cores, as the others compute meanwhile.
    encoding: Arc<Semaphore>,
    /// Bytes of the longest token.
    token_bytes_max: usize,
    vocab_size: usize,
    model_len: u32,
    request_timeout: Duration,
    load_time: Duration,
    summary: String,
    _thread: JoinHandle<()>,
}

impl Engine {
    /// Loads the model and starts the step thread. Blocks until the model is ready (about a second per 100 MB).
    ///
    /// Publishing KV events needs a tokio runtime around the call.
    pub fn start(
        config: &EngineConfig,
        path: &Path,
        model: ModelName,
        deps: EngineDeps<'_>,
    ) -> Result<Self, StartError> {
        let begun = Instant::now();
        if let Some(problem) = config.problems().into_iter().next() {
            return Err(problem.into());
        }
        let publisher = config.kv_events.as_ref().map(Publisher::bind).transpose()?;
        let file = Arc::new(ModelFile::open(path)?);
        let Layout { spec, block_size, blocks, positions_max } = Layout::plan(config, &file, path)?;
        check_memory(path, spec.memory_for_blocks(blocks, block_size))?;
        let text =
            text_model(file.gguf()).map_err(|source| StartError::Text { path: path.into(), source })?;
        let threads = config.threads.map_or_else(cores, |n| n as usize);
        let pool = Arc::new(Pool::new(threads));
        let isa = deps.isa.unwrap_or_else(Isa::detect);

        let options = CpuOptions { isa, threads, block_size, blocks, positions_max };
        let executor = CpuExecutor::with_pool(&file, &options, pool.clone())
            .map_err(|source| StartError::Build { path: path.into(), source })?;
        let publish =
            publisher.map(|publisher| publisher.start(deps.metrics.kv_events.for_model(model.as_str())));
        let kv_sink = both(deps.kv_sink, publish);
        let scheduler = Scheduler::new(SchedulerConfig {
            block_size: block_size as u32,
            blocks: blocks as u32,
            step_tokens_max: config.max_num_batched_tokens,
            running_max: config.max_num_seqs,
            waiting_max: config.max_num_queued_reqs,
            waiting_tokens_max: u64::from(config.max_num_queued_tokens),
            model_len_max: positions_max as u32,
            prefix_cache: config.enable_prefix_caching,
            kv_events: kv_sink.is_some(),
            itl_slo: Some(config.itl_slo.get()),
            ..SchedulerConfig::default()
        });
        let kv = KvInfo {
            block_size: block_size as u32,
            blocks: blocks as u32,
            prefix_caching: config.enable_prefix_caching,
        };
        let metrics = deps.metrics.for_model(model.as_str(), &kv);
        let summary = format!(
            "{}, {} layers, {} threads, {}, KV cache for {} tokens",
            path.display(),
            spec.layers,
            threads,
            isa.as_str(),
            blocks * block_size,
        );
        Self::run(model, text, executor, scheduler, pool, metrics, kv_sink, config, begun, summary)
    }

    /// Whether [`Engine::start`] would take this configuration for this file. Reads the file's head only, and leaves
    /// out what depends on the machine's free memory.
    pub fn inspect(config: &EngineConfig, path: &Path) -> Result<(), StartError> {
        if let Some(problem) = config.problems().into_iter().next() {
            return Err(problem.into());
        }
        let file = ModelFile::open(path)?;
        Layout::plan(config, &file, path).map(|_| ())
    }

    #[allow(clippy::too_many_arguments)] // The two ways to start (real and fake executor) meet here.
    pub(crate) fn run<E: Executor + 'static>(
        model: ModelName,
        text: TextModel,
        executor: E,
        scheduler: Scheduler,
        pool: Arc<Pool>,
        metrics: crate::metrics::ModelMetrics,
        kv_sink: Option<KvSink>,
        config: &EngineConfig,
        begun: Instant,
        summary: String,
    ) -> Result<Self, StartError> {
        let (inbox, submissions) = mpsc::channel(INBOX_MAX);
        let vocab_size = executor.vocab_size();
        let model_len = scheduler.seq_tokens_max();
        let step_loop = StepLoop {
            executor,
            scheduler,
            pool,
            tokenizer: text.tokenizer().clone(),
            metrics,
            kv_sink,
            inbox: submissions,
            request_timeout: config.request_timeout.get(),
            state: LoopState::new(begun),
        };
        let thread = std::thread::Builder::new()
            .name("forebay-engine".into())
            .spawn(move || step_loop.run())
            .map_err(StartError::Thread)?;
        Ok(Self {
            model,
            token_bytes_max: token_bytes_max(&text),
            text,
            inbox,
            grammars: Arc::default(),
            encoding: Arc::new(Semaphore::new((cores() / 2).max(1))),
            vocab_size,
            model_len,
            request_timeout: config.request_timeout.get(),
            load_time: begun.elapsed(),
            summary,
            _thread: thread,
        })
    }

    /// Takes nothing more, finishes every request that it has, and gives its memory back. Blocks until then.
    pub fn stop(self) {
        let Self { inbox, _thread: thread, text, .. } = self;
        drop((inbox, text));
        if thread.join().is_err() {
            tracing::error!("the engine's thread had panicked");
        }
    }

    pub fn model(&self) -> &ModelName {
        &self.model
    }

    /// Tokens of one sequence at most, prompt and output.
    pub fn model_len(&self) -> u32 {
        self.model_len
    }

    /// Bytes that a text of [`model_len`](Self::model_len) tokens can have at most: one of more needs no tokenizer to be
    /// refused.
    ///
    /// A template that trims contents, or drops them, could make a shorter prompt of more; so long a text is refused all
    /// the same, as even to trim it is work.
    pub fn prompt_bytes_max(&self) -> usize {
        (self.model_len as usize).saturating_mul(self.token_bytes_max)
    }

    /// Refuses prompts that can't fit, by their size alone. One that passes may still be too long.
    pub fn fits(&self, prompt: &Prompt) -> Result<(), Fault> {
        let param = if matches!(prompt, Prompt::Chat { .. }) { "messages" } else { "prompt" };
        self.fit_bytes(prompt.bytes_max(), param)
    }

    fn fit_bytes(&self, bytes: usize, param: &str) -> Result<(), Fault> {
        let (tokens, limit) = (self.model_len, self.prompt_bytes_max());
        if bytes <= limit {
            return Ok(());
        }
        let message = format!(
            "This model's maximum context length is {tokens} tokens, which is {limit} bytes of text at most. However, your \
             {param} resulted in {bytes} bytes. Please reduce the length of the {param}."
        );
        Err(Fault::new(Class::new(Code::ContextLengthExceeded, Blame::Client), message).param(param))
    }

    pub fn load_time(&self) -> Duration {
        self.load_time
    }

    /// One line for people: file, layers, threads, instructions, KV cache.
    pub fn summary(&self) -> &str {
        &self.summary
    }

    /// False once the step thread has died: no request can succeed any more.
    pub fn is_alive(&self) -> bool {
        !self.inbox.is_closed()
    }

    pub fn tokenizer_id(&self) -> TokenizerId {
        self.text.tokenizer().id()
    }

    /// The ids of each prompt of a call. Pure CPU work, 20 to 50 ms per MB of text.
    pub fn encode(&self, prompt: &Prompt) -> Result<PromptIds, Fault> {
        prompt::encode(&self.text, prompt)
    }

    async fn generate(&self, flow: Flow<Placed>) -> Result<Reply, Fault> {
        let called = Instant::now();
        let Flow { origin, stage } = flow;
        let Ask::Generate(call) = stage.ask else {
            return Err(Fault::internal("generate() was called with another ask"));
        };
        if let Some(need) = call.needs.first() {
            return Err(need.clone().into());
        }
        let prompts = match stage.ids {
            PromptIds::Exact { tokenizer, prompts } if tokenizer == self.tokenizer_id() => prompts,
            // Counted with another vocabulary, or only estimated: count with our own.
            _ => match self.encode_off_thread(&call).await? {
                PromptIds::Exact { prompts, .. } => prompts,
                PromptIds::Estimated { .. } => {
                    return Err(Fault::internal("the engine's own encoder only estimated"));
                }
            },
        };
        let asks = self.prompt_asks(&call, prompts)?;
        self.check_ids(&call)?;
        let allowed = call.sampling.allowed_token_ids.as_deref().map(|ids| Mask::of(ids, self.vocab_size));
        let bad_words = BadWords::new(&call.bad_words, self.text.tokenizer())
            .map_err(|error| Fault::from(error).param("bad_words"))?;
        let seed = call.sampling.seed.map_or_else(fresh_seed, Ok)?;
        let constrained = self.constrain(call.constraint.as_ref()).await?;
        let matcher = StopMatcher::new(&call.stop, call.include_stop_str_in_output)?;
        let model_ends: &[TokenId] = if call.ignore_eos { &[] } else { self.text.tokenizer().eog() };
        let end_tokens = model_ends.iter().chain(&call.stop_token_ids).copied().collect();
        let (events, mut receiver) = mpsc::channel(Submission::events_max(&asks, call.n));
        let submission = Submission {
            prompts: asks,
            n: call.n,
            how: Arc::new(How {
                sampling: call.sampling.clone(),
                seed,
                stop: call.stop.clone(),
                matcher,
                end_tokens,
                min_tokens: call.min_tokens,
                logprobs: call.logprobs,
                constrained,
                allowed,
                bad_words,
                cache_salt: call.cache_salt.clone(),
                priority: call.priority,
                tenant: stage.caller.consumer.clone(),
            }),
            arrived: called,
            deadline: called + self.request_timeout,
            events,
        };
        self.inbox.try_send(submission).map_err(|error| match error {
            mpsc::error::TrySendError::Full(_) => overloaded(),
            mpsc::error::TrySendError::Closed(_) => stopped(),
        })?;
        // The head is held until the first token is certain, so that a refusal is still an error with a status.
        let first = receiver.recv().await.ok_or_else(stopped)??;
        if let Event::Started { prompt_tokens, cached_tokens } = &first {
            let why = format!("{prompt_tokens} prompt tokens, {cached_tokens} from cache");
            origin.trace.note(Layer::Engine, "prefill", called, why);
        }
        let form = if call.stream { ReplyForm::Sse } else { ReplyForm::Json };
        let events = EventStream {
            first: Some(first),
            receiver,
            trace: origin.trace.clone(),
            begun: Instant::now(),
            ended: false,
        };
        Ok(Reply::new(form, Box::pin(events)))
    }

    /// Compiles what the output has to match. The first time, the vocabulary is prepared for it, too.
    async fn constrain(&self, constraint: Option<&Constraint>) -> Result<Option<Beginning>, Fault> {
        let Some(constraint) = constraint.cloned() else { return Ok(None) };
        let (grammars, tokenizer) = (Arc::clone(&self.grammars), self.text.tokenizer().clone());
        self.off_thread(move || {
            let made = grammars.get_or_init(|| Grammars::new(&tokenizer)).as_ref().map_err(Clone::clone);
            let compiled = made.and_then(|grammars| Beginning::new(grammars.compile(&constraint)?));
            let param = match constraint {
                Constraint::JsonObject | Constraint::JsonSchema(_) => "response_format",
                _ => "structured_outputs",
            };
            compiled.map(Some).map_err(|error| Fault::from(error).param(param))
        })
        .await
    }

    async fn encode_off_thread(&self, call: &Generate) -> Result<PromptIds, Fault> {
        self.fits(&call.prompt)?;
        let (text, prompt) = (self.text.clone(), call.prompt.clone());
        self.off_thread(move || prompt::encode(&text, &prompt)).await
    }

    /// Runs the tokenizer on a thread for blocking work. A client that leaves while others are before it is forgotten.
    async fn off_thread<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> Result<T, Fault> + Send + 'static,
    ) -> Result<T, Fault> {
        let permit = Arc::clone(&self.encoding).acquire_owned().await.expect("never closed");
        let done = tokio::task::spawn_blocking(move || {
            let _permit = permit;
            work()
        });
        done.await.map_err(|error| Fault::internal(format!("the tokenizer task failed: {error}")))?
    }

    /// Checks each prompt against the model and fixes how much may be generated for it.
    fn prompt_asks(&self, call: &Generate, prompts: Vec<Arc<[TokenId]>>) -> Result<Vec<PromptAsk>, Fault> {
        if call.echo && call.logprobs.is_some() {
            // The prompt's own log-probabilities would be missing: refused rather than answered by half.
            let class = Class::new(Code::NotSupported, Blame::Client);
            let message = "`echo` together with `logprobs` is not supported; ask for one of them";
            return Err(Fault::new(class, message).param("echo"));
        }
        let choices = prompts.len().saturating_mul(call.n as usize);
        if choices > CHOICES_MAX {
            let message = format!(
                "the request asks for {choices} choices (prompts times `n`); the limit is {CHOICES_MAX}"
            );
            return Err(Fault::bad_request(message).param("n"));
        }
        let param = match call.api {
            Api::ChatCompletions => "messages",
            Api::Completions => "prompt",
        };
        prompts
            .into_iter()
            .enumerate()
            .map(|(p, ids)| {
                if let Some(id) = ids.iter().find(|&&id| id as usize >= self.vocab_size) {
                    let message = format!("token id {id} is out of the vocabulary of {} tokens", self.vocab_size);
                    return Err(Fault::bad_request(message).param(param));
                }
                if ids.is_empty() {
                    return Err(Fault::bad_request("the prompt is empty: it has no tokens").param(param));
                }
                let prompt_tokens = ids.len() as u32;
                let left = self.model_len.saturating_sub(prompt_tokens);
                let max_tokens = match (call.max_tokens, call.api) {
                    (Some(asked), _) if asked <= left => asked,
                    (None, Api::Completions) if left > 0 => COMPLETION_TOKENS_DEFAULT.min(left),
                    (None, Api::ChatCompletions) if left > 0 => left,
                    (asked, _) => return Err(self.too_long(prompt_tokens, asked, param)),
                };
                if call.min_tokens > max_tokens {
                    let message = format!(
                        "min_tokens is {}, but only {max_tokens} tokens may be generated; raise max_tokens or lower it",
                        call.min_tokens
                    );
                    return Err(Fault::bad_request(message).param("min_tokens"));
                }
                let echo = call.echo.then(|| match &call.prompt {
                    Prompt::Text(texts) => texts.get(p).cloned().unwrap_or_default(),
                    _ => self.text.tokenizer().decode(&ids, false),
                });
                Ok(PromptAsk { ids, max_tokens, echo })
            })
            .collect()
    }

    /// A bias on a token that isn't there would do nothing, silently.
    fn check_ids(&self, call: &Generate) -> Result<(), Fault> {
        let biased = call.sampling.logit_bias.iter().map(|(id, _)| (*id, "logit_bias"));
        let allowed = call.sampling.allowed_token_ids.iter().flatten().map(|id| (*id, "allowed_token_ids"));
        let unknown = biased.chain(allowed).find(|(id, _)| *id as usize >= self.vocab_size);
        unknown.map_or(Ok(()), |(id, param)| {
            let message = format!("token id {id} is out of the vocabulary of {} tokens", self.vocab_size);
            Err(Fault::bad_request(message).param(param))
        })
    }

    fn too_long(&self, prompt_tokens: u32, asked: Option<u32>, param: &str) -> Fault {
        let limit = self.model_len;
        let message = match asked {
            Some(asked) if prompt_tokens < limit => format!(
                "This model's maximum context length is {limit} tokens. However, you requested {} tokens ({prompt_tokens} in \
                 the {param}, {asked} in the completion). Please reduce the length of the {param} or completion.",
                u64::from(prompt_tokens) + u64::from(asked),
            ),
            _ => format!(
                "This model's maximum context length is {limit} tokens. However, your {param} resulted in {prompt_tokens} \
                 tokens. Please reduce the length of the {param}."
            ),
        };
        Fault::new(Class::new(Code::ContextLengthExceeded, Blame::Client), message).param(param)
    }
}

/// How much of what a model file and a configuration give.
struct Layout {
    spec: ModelSpec,
    block_size: usize,
    blocks: usize,
    positions_max: usize,
}

impl Layout {
    fn plan(config: &EngineConfig, file: &ModelFile, path: &Path) -> Result<Self, StartError> {
        let spec = ModelSpec::from_gguf(file.gguf())
            .map_err(|source| StartError::Spec { path: path.into(), source })?;
        let block_size = config.block_size as usize;
        let wanted = spec.blocks_for_memory(config.kv_cache_memory.bytes(), block_size);
        if wanted == 0 {
            let needed = forebay_config::ByteSize::new(spec.memory_for_blocks(1, block_size));
            return Err(StartError::KvTooSmall { given: config.kv_cache_memory, needed });
        }
        if let Some(asked) = config.max_model_len
            && asked as usize > spec.context_len
        {
            return Err(StartError::ModelLen { asked, trained: spec.context_len });
        }
        let positions_max = config.max_model_len.map_or(spec.context_len, |n| n as usize);
        // No more blocks than all running sequences could fill.
        let useful = positions_max.div_ceil(block_size).saturating_mul(config.max_num_seqs as usize);
        Ok(Self { spec, block_size, blocks: wanted.min(useful), positions_max })
    }
}

impl Stage<Placed> for Engine {
    async fn call(&self, flow: Flow<Placed>) -> Result<Reply, Fault> {
        match &flow.stage.ask {
            Ask::Generate(_) => self.generate(flow).await,
            Ask::Tokenize(call) => {
                let param = match call.input {
                    TokenizeInput::Prompt(_) => "prompt",
                    TokenizeInput::Messages { .. } => "messages",
                };
                self.fit_bytes(call.input.bytes_max(), param)?;
                let (text, call, len) = (self.text.clone(), call.clone(), self.model_len);
                self.off_thread(move || prompt::tokenize(&text, &call, len)).await
            }
            Ask::Detokenize(call) => {
                let (text, call) = (self.text.clone(), call.clone());
                self.off_thread(move || prompt::detokenize(&text, &call)).await
            }
            Ask::ListModels | Ask::GetModel(_) => Err(Fault::internal("model listings are the proxy's")),
        }
    }
}

/// Who wants the KV events: the router of this process, those elsewhere, both or nobody.
fn both(here: Option<KvSink>, elsewhere: Option<KvSink>) -> Option<KvSink> {
    match (here, elsewhere) {
        (Some(here), Some(elsewhere)) => Some(Arc::new(move |events| {
            here(events);
            elsewhere(events);
        })),
        (one, other) => one.or(other),
    }
}

/// The events of one request. Dropping it closes the channel, which is how the step loop learns that the client left.
struct EventStream {
    first: Option<Event>,
    receiver: mpsc::Receiver<Result<Event, Fault>>,
    trace: Trace,
    begun: Instant,
    ended: bool,
}

impl futures_util::Stream for EventStream {
    type Item = Result<Chunk, Fault>;

    fn poll_next(
        mut self: std::pin::Pin<&mut Self>,
        context: &mut std::task::Context<'_>,
    ) -> std::task::Poll<Option<Self::Item>> {
        use std::task::Poll;
        if let Some(first) = self.first.take() {
            return Poll::Ready(Some(Ok(Chunk::Event(first))));
        }
        let item = std::task::ready!(self.receiver.poll_recv(context));
        match item {
            Some(Ok(event)) => {
                if let Event::Done { usage } = &event {
                    self.ended = true;
                    let why = format!("{} tokens", usage.completion_tokens);
                    self.trace.note(Layer::Engine, "decode", self.begun, why);
                }
                Poll::Ready(Some(Ok(Chunk::Event(event))))
            }
            Some(Err(fault)) => {
                self.ended = true;
                Poll::Ready(Some(Err(fault)))
            }
            // The step thread is gone in the middle of an answer.
            None if !self.ended => {
                self.ended = true;
                // Something has reached the client: the same request elsewhere would repeat it.
                let mut fault = stopped();
                fault.class.retry = Retry::Never;
                Poll::Ready(Some(Err(fault)))
            }
            None => Poll::Ready(None),
        }
    }
}

fn overloaded() -> Fault {
    let class = Class::new(Code::Overloaded, Blame::Us).retry(Retry::After(RETRY_AFTER));
    Fault::new(
        class,
        format!("the engine's inbox is full: {INBOX_MAX} requests arrived within one step; try again later"),
    )
}

fn stopped() -> Fault {
    let class = Class::new(Code::ModelUnavailable, Blame::Us).retry(Retry::Elsewhere);
    Fault::new(class, "the engine has stopped")
        .detail("the step thread has ended; an earlier log line says why")
}

fn fresh_seed() -> Result<u64, Fault> {
    getrandom::u64().map_err(|error| Fault::internal(format!("no randomness: {error}")))
}

fn token_bytes_max(text: &TextModel) -> usize {
    let tokenizer = text.tokenizer();
    (0..tokenizer.vocab_size() as TokenId).map(|id| tokenizer.token_bytes(id).len()).max().unwrap_or(0)
}

fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, std::num::NonZero::get)
}
