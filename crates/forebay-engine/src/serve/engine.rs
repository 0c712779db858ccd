//! The engine as the rest of the program sees it: a stage that turns a placed request into events.

use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use bytes::Bytes;
use forebay_flow::{Flow, Origin, Placed, PromptIds, Reply, ReplyForm, Stage};
use forebay_grammar::{GrammarError, Grammars, Mask, Matcher};
use forebay_kernels::{Isa, Pool};
use forebay_observe::Layer;
use forebay_schedule::{Scheduler, SchedulerConfig};
use forebay_tokens::{StopMatcher, TextModel};
use forebay_types::{
    Blame, Class, Code, ConsumerName, Fault, ModelName, RequestId, Retry, TokenId, TokenizerId,
};
use forebay_wire::{
    Api, Ask, Constraint, Event, Generate, TokenizeInput, TokensCall, ToolChoice, render_tokens_calls,
};
use tokio::sync::mpsc;

use super::answers::Answers;
use super::constrain::Beginning;
use super::control::{Message, Paused};
use super::embed::not_this_api;
use super::events::{EventStream, stopped};
use super::layout::{Layout, Room, cores};
use super::load::LoadReport;
use super::memory::check_memory;
use super::off_thread::OffThread;
use super::prompt;
use super::reading::Forms;
use super::scores::rows_max;
use super::start_error::StartError;
use super::step_loop::{LoopState, StepLoop};
use super::submission::{How, Submission};
use super::template::with_template;
use super::told::Told;
use super::watchdog::Watchdog;
use super::words::BadWords;
use super::{KvSink, Sinks, hf_text, text, tokenizer_info};
use crate::config::EngineConfig;
use crate::exec::{self, CpuOptions, Executor};
use crate::generation::GenerationDefaults;
use crate::kv_events::{KvEventSource, Publisher};
use crate::metrics::{ConstraintMetrics, EngineLoad, EngineMetrics, KvInfo, LoadGauges};
use crate::model::{ModelFile, Ranks};
use crate::sample::Wanted;

/// Submissions on their way to the step thread. It takes them between steps, so this bounds what arrives during one.
pub(super) const INBOX_MAX: usize = 8192;
/// Tells a client when to come back where the inbox is full: the next steps empty it.
pub(super) const RETRY_AFTER: Duration = Duration::from_secs(2);

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
    pub(super) text: TextModel,
    pub(super) inbox: mpsc::Sender<Message>,
    pub(super) paused: Paused,
    gauges: LoadGauges,
    forms: Forms,
    /// Made by the first request that needs it.
    grammars: Arc<OnceLock<Result<Grammars, GrammarError>>>,
    off_thread: OffThread,
    /// Bytes of the longest token.
    token_bytes_max: usize,
    pub(super) vocab_size: usize,
    pub(super) model_len: u32,
    /// For requests that leave a value open.
    pub(super) generation: GenerationDefaults,
    pub(super) watchdog: Watchdog,
    constraints: ConstraintMetrics,
    pub(super) max_logprobs: u32,
    seeds: Seeds,
    request_timeout: Duration,
    load_time: Duration,
    summary: String,
    kv_event_source: Option<KvEventSource>,
    answers: Answers,
    /// The answer of `/tokenizer_info`, where it is on.
    tokenizer_info: Option<Bytes>,
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
        let kv_event_source = publisher.as_ref().map(Publisher::source);
        let file = Arc::new(ModelFile::open(path)?);
        let layout = Layout::plan(config, &file, path, Room::here())?;
        let kv_bytes = layout.kv_bytes();
        check_memory(&file, kv_bytes)?;
        let Layout { spec, ranks, block_size, blocks, positions_max, cut_from } = layout;
        if let Some(trained) = cut_from {
            let kv = forebay_config::ByteSize::new(kv_bytes);
            tracing::warn!(
                model = model.as_str(),
                "the KV cache ({kv}) has room for requests of {positions_max} tokens, less than the {trained} that the model \
                 allows; raise `engine.kv-cache-memory` for longer ones"
            );
        }
        let text = with_template(text_of(&file, path)?, config.chat_template.as_deref())?;
        let generation = generation_of(config, &file, path)?;
        let tokenizer_info = config
            .enable_tokenizer_info_endpoint
            .then(|| tokenizer_info::render(&text, file.directory(), positions_max as u32))
            .transpose()
            .map_err(|source| StartError::HfText { path: path.into(), source: Box::new(source) })?;
        let threads = config.threads.map_or_else(cores, |n| n as usize);
        let pool = Arc::new(Pool::new(exec::threads_per_rank(threads, ranks)));
        let isa = deps.isa.unwrap_or_else(Isa::detect);

        let options = CpuOptions { isa, threads, block_size, blocks, positions_max };
        let executor = exec::start(&file, ranks, &options, pool.clone())
            .map_err(|source| StartError::Build { path: path.into(), source })?;
        let publish =
            publisher.map(|publisher| publisher.start(deps.metrics.kv_events.for_model(model.as_str())));
        let (publish, load) = publish.unzip();
        let sinks = Sinks { kv: both(deps.kv_sink, publish), load };
        let scheduler = Scheduler::new(SchedulerConfig {
            block_size: block_size as u32,
            blocks: blocks as u32,
            step_tokens_max: config.max_num_batched_tokens,
            running_max: config.max_num_seqs,
            unfinished_max: config.max_num_queued_reqs,
            waiting_tokens_max: u64::from(config.max_num_queued_tokens),
            model_len_max: positions_max as u32,
            prefix_cache: config.enable_prefix_caching,
            kv_events: sinks.kv.is_some(),
            itl_slo: Some(config.itl_slo.get()),
            prompt_logits_max: rows_max(spec.vocab_size),
            ..SchedulerConfig::default()
        });
        let kv = KvInfo {
            block_size: block_size as u32,
            blocks: blocks as u32,
            blocks_override: config.num_gpu_blocks_override,
            bytes: kv_bytes,
            prefix_caching: config.enable_prefix_caching,
            model_len: positions_max as u32,
        };
        let metrics = deps.metrics.for_model(model.as_str(), &kv);
        let summary = format!(
            "{}, {} layers, {} threads, {}{}, KV cache for {} tokens",
            path.display(),
            spec.layers,
            threads,
            match ranks {
                Ranks::ONE => String::new(),
                Ranks { tensor, pipeline } =>
                    format!("tensor parallel {tensor} x pipeline parallel {pipeline}, "),
            },
            isa.as_str(),
            blocks * block_size,
        );
        let engine =
            Self::run(model, text, executor, scheduler, pool, metrics, sinks, config, begun, summary)?;
        Ok(Self { kv_event_source, generation, tokenizer_info, ..engine })
    }

    /// Whether [`Engine::start`] would take this configuration for this file. Reads the file's head only, and leaves
    /// out what depends on the machine's free memory.
    pub fn inspect(config: &EngineConfig, path: &Path) -> Result<(), StartError> {
        if let Some(problem) = config.problems().into_iter().next() {
            return Err(problem.into());
        }
        let file = ModelFile::open(path)?;
        // Memory is what it will be then.
        Layout::plan(config, &file, path, Room { cores: cores(), memory: None })?;
        generation_of(config, &file, path).map(|_| ())
    }

    #[allow(clippy::too_many_arguments)] // The two ways to start (real and fake executor) meet here.
    pub(crate) fn run<E: Executor + 'static>(
        model: ModelName,
        text: TextModel,
        executor: E,
        scheduler: Scheduler,
        pool: Arc<Pool>,
        metrics: crate::metrics::ModelMetrics,
        sinks: Sinks,
        config: &EngineConfig,
        begun: Instant,
        summary: String,
    ) -> Result<Self, StartError> {
        let (inbox, submissions) = mpsc::channel(INBOX_MAX);
        let vocab_size = executor.vocab_size();
        let model_len = scheduler.seq_tokens_max();
        let (paused, gauges) = (Paused::default(), metrics.load_gauges());
        let watchdog = Watchdog::start(config.watchdog, model.as_str(), metrics.stuck_steps())
            .map_err(StartError::Thread)?;
        let constraints = metrics.constraints().clone();
        let step_loop = StepLoop {
            heartbeat: watchdog.heartbeat(),
            executor,
            load: LoadReport::new(sinks.load, &scheduler),
            scheduler,
            pool,
            tokenizer: text.tokenizer().clone(),
            metrics,
            kv_sink: sinks.kv,
            inbox: submissions,
            paused: paused.clone(),
            request_timeout: config.request_timeout.get(),
            state: LoopState::new(begun),
        };
        let thread = std::thread::Builder::new()
            .name("forebay-engine".into())
            .spawn(move || step_loop.run())
            .map_err(StartError::Thread)?;
        Ok(Self {
            answers: Answers::new(config, &model),
            model,
            token_bytes_max: token_bytes_max(&text),
            forms: Forms::new(&text, config.tool_call_parser, config.reasoning_parser),
            text,
            inbox,
            paused,
            gauges,
            grammars: Arc::default(),
            off_thread: OffThread::new(),
            vocab_size,
            model_len,
            generation: config.override_generation_config,
            watchdog,
            constraints,
            max_logprobs: config.max_logprobs,
            seeds: Seeds::new(config.seed),
            request_timeout: config.request_timeout.get(),
            load_time: begun.elapsed(),
            summary,
            kv_event_source: None,
            tokenizer_info: None,
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

    /// Where its KV events are published, if they are.
    pub fn kv_event_source(&self) -> Option<&KvEventSource> {
        self.kv_event_source.as_ref()
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

    pub fn load_time(&self) -> Duration {
        self.load_time
    }

    /// One line for people: file, layers, threads, instructions, KV cache.
    pub fn summary(&self) -> &str {
        &self.summary
    }

    /// Whether a step takes longer than `engine.watchdog`. It may still come back.
    pub fn is_stuck(&self) -> bool {
        self.watchdog.sees_stuck_step()
    }

    /// False once the step thread has died: no request can succeed any more.
    pub fn is_alive(&self) -> bool {
        !self.inbox.is_closed()
    }

    /// How much there is to do, as of the last step.
    pub fn load(&self) -> EngineLoad {
        self.gauges.read()
    }

    pub fn tokenizer_id(&self) -> TokenizerId {
        self.text.tokenizer().id()
    }

    /// The ids of each prompt of a call. Pure CPU work, 20 to 50 ms per MB of text.
    pub fn encode(&self, call: &Generate) -> Result<PromptIds, Fault> {
        prompt::encode(&self.text, call, self.model_len)
    }

    async fn generate(&self, flow: Flow<Placed>) -> Result<Reply, Fault> {
        let called = Instant::now();
        let Flow { origin, stage } = flow;
        let Placed { ask: Ask::Generate(call), ids, caller, held: _ } = stage else {
            return Err(Fault::internal("generate() was called with another ask"));
        };
        let mut receiver = self.submit(&call, ids, &origin, caller.consumer, called).await?;
        // The head is held until the first token is certain, so that a refusal is still an error with a status.
        let first = receiver.recv().await.ok_or_else(stopped)??;
        if let Told::Event(Event::Started { prompt_tokens, cached_tokens }) = &first {
            let why = format!("{prompt_tokens} prompt tokens, {cached_tokens} from cache");
            origin.trace.note(Layer::Engine, "prefill", called, why);
        }
        let form = if call.stream { ReplyForm::Sse } else { ReplyForm::Json };
        let events = EventStream {
            next: Some(first),
            receiver,
            tokenizer: self.text.tokenizer().clone(),
            off_thread: self.off_thread.clone(),
            trace: origin.trace.clone(),
            begun: Instant::now(),
        };
        Ok(Reply::new(form, events.into_chunks()).rendered_as(|| self.answers.spec(&call)))
    }

    /// Hands a call to the step thread, and gives what it tells of it.
    ///
    /// Cancellation: dropping the receiver ends the request before the next step.
    pub(super) async fn submit(
        &self,
        call: &Generate,
        ids: PromptIds,
        origin: &Origin,
        tenant: ConsumerName,
        called: Instant,
    ) -> Result<mpsc::Receiver<Result<Told, Fault>>, Fault> {
        if let Some(need) = call.needs.first() {
            return Err(need.clone().into());
        }
        let prompts = self.own_ids(call, ids).await?;
        let asks = self.prompt_asks(call, prompts)?;
        self.check_ids(call)?;
        let allowed = call.sampling.allowed_token_ids.as_deref().map(|ids| Mask::of(ids, self.vocab_size));
        let bad_words = BadWords::new(&call.bad_words, self.text.tokenizer())
            .map_err(|error| Fault::from(error).param("bad_words"))?;
        let seed = call.sampling.seed.map_or_else(|| self.seeds.next(), Ok)?;
        let tokenizer = self.text.tokenizer();
        let prompt = asks.first().map_or(&[][..], |ask| &ask.ids);
        let reading = self.forms.reading(call, prompt, tokenizer)?;
        let calls = reading.as_ref().and_then(|reading| reading.grammar(call, tokenizer));
        let constrained = match (calls, &call.constraint) {
            // Where there are only calls, `response_format` has nothing to say.
            (Some(calls), _) => Some(self.constrain("tools", move |g| g.compile_lark(calls)).await?),
            (None, Some(constraint)) => {
                let param = match constraint {
                    Constraint::JsonObject | Constraint::JsonSchema(_) => "response_format",
                    _ => "structured_outputs",
                };
                let constraint = constraint.clone();
                Some(self.constrain(param, move |g| g.compile(&constraint)).await?)
            }
            (None, None) => None,
        };
        let matcher = StopMatcher::new(&call.stop, call.include_stop_str_in_output)?;
        let (model_ends, end_of_text): (&[TokenId], _) =
            if call.ignore_eos { (&[], None) } else { (tokenizer.eog(), tokenizer.eos()) };
        let end_tokens = model_ends.iter().chain(&call.stop_token_ids).copied().collect();
        let (events, receiver) = mpsc::channel(Submission::events_max(&asks, call.n));
        let submission = Submission {
            id: origin.id.clone(),
            own_id: call.request_id.as_deref().map(RequestId::from),
            prompts: asks,
            n: call.n,
            how: Arc::new(How {
                sampling: self.generation.fill(&call.sampling),
                seed,
                include_stop: call.include_stop_str_in_output,
                stops: call.stop.clone(),
                matcher,
                end_tokens,
                end_of_text,
                min_tokens: call.min_tokens,
                logprobs: call.logprobs.map(|top| match &call.logprob_token_ids[..] {
                    [] => Wanted::Top(top),
                    ids => Wanted::Ids(ids.into()),
                }),
                prompt_logprobs: call.prompt_logprobs,
                echo_logprobs: call.logprobs.filter(|_| call.echo && call.api == Api::Completions),
                token_ids: call.return_token_ids,
                skip_special: call.skip_special_tokens,
                interval: if call.stream { call.stream_interval } else { 1 },
                reading,
                constrained,
                allowed,
                bad_words,
                cache_salt: call.cache_salt.clone(),
                priority: call.priority,
                tenant,
            }),
            arrived: called,
            deadline: called + self.request_timeout,
            events,
        };
        self.inbox.try_send(Message::Submit(submission)).map_err(|error| match error {
            mpsc::error::TrySendError::Full(_) => overloaded(),
            mpsc::error::TrySendError::Closed(_) => stopped(),
        })?;
        Ok(receiver)
    }

    /// What a call would generate from, for vLLM's token-in token-out API.
    async fn render(&self, flow: Flow<Placed>) -> Result<Reply, Fault> {
        let Flow { origin, stage } = flow;
        let Ask::Render(mut call) = stage.ask else {
            return Err(Fault::internal("render() was called with another ask"));
        };
        if let Some(need) = call.needs.first() {
            return Err(need.clone().into());
        }
        // What is rendered says nothing of calls: the output would not be held to them.
        if matches!(call.tool_choice, ToolChoice::Required | ToolChoice::Function(_)) {
            let message = "calls that must come can't be rendered; set 'tool_choice' to 'auto'";
            return Err(Fault::bad_request(message).param("tool_choice"));
        }
        let prompts = self.own_ids(&call, stage.ids).await?;
        let asks = self.prompt_asks(&call, prompts)?;
        let prompt = asks.first().map_or(&[][..], |ask| &ask.ids);
        let tokenizer = self.text.tokenizer();
        let reading = self.forms.reading(&call, prompt, tokenizer)?;
        if reading.is_some_and(|reading| reading.grammar(&call, tokenizer).is_some()) {
            let message = "calls of functions with 'strict' can't be rendered; leave 'strict' out, or set 'tool_choice' to \
                           'none'";
            return Err(Fault::bad_request(message).param("tools"));
        }
        // Whoever generates from it may know another model's defaults.
        call.sampling = self.generation.fill(&call.sampling);
        let calls: Vec<TokensCall<'_>> =
            asks.iter().map(|ask| TokensCall { token_ids: &ask.ids, max_tokens: ask.max_tokens }).collect();
        let id = call.request_id.as_deref().unwrap_or(origin.id.as_str());
        Ok(Reply::json(render_tokens_calls(id, &call, &calls)))
    }

    /// The prompts in this model's own tokens.
    async fn own_ids(&self, call: &Generate, ids: PromptIds) -> Result<Vec<Arc<[TokenId]>>, Fault> {
        match ids {
            PromptIds::Exact { tokenizer, prompts } if tokenizer == self.tokenizer_id() => Ok(prompts),
            // Counted with another vocabulary, or only estimated: count with our own.
            _ => match self.encode_off_thread(call).await? {
                PromptIds::Exact { prompts, .. } => Ok(prompts),
                PromptIds::Estimated { .. } => {
                    Err(Fault::internal("the engine's own encoder only estimated"))
                }
            },
        }
    }

    /// Compiles what the output has to match. The first time, the vocabulary is prepared for it, too.
    async fn constrain(
        &self,
        param: &'static str,
        compile: impl FnOnce(&Grammars) -> Result<Matcher, GrammarError> + Send + 'static,
    ) -> Result<Beginning, Fault> {
        let (grammars, tokenizer) = (Arc::clone(&self.grammars), self.text.tokenizer().clone());
        let metrics = self.constraints.clone();
        self.off_thread
            .run(move || {
                let made = grammars.get_or_init(|| Grammars::new(&tokenizer)).as_ref().map_err(Clone::clone);
                let compiled = made.and_then(|grammars| Beginning::new(compile(grammars)?));
                compiled.map_err(|error| {
                    metrics.on_refused(&error);
                    Fault::from(error).param(param)
                })
            })
            .await
    }

    async fn encode_off_thread(&self, call: &Generate) -> Result<PromptIds, Fault> {
        self.fits(&call.prompt)?;
        let (text, call, len) = (self.text.clone(), call.clone(), self.model_len);
        self.off_thread.run(move || prompt::encode(&text, &call, len)).await
    }
}

impl Stage<Placed> for Engine {
    async fn call(&self, flow: Flow<Placed>) -> Result<Reply, Fault> {
        match &flow.stage.ask {
            Ask::Generate(_) => self.generate(flow).await,
            Ask::Embed(_) => Err(not_this_api("Embeddings")),
            Ask::Render(_) => self.render(flow).await,
            Ask::Tokenize(call) => {
                let param = match call.input {
                    TokenizeInput::Prompt(_) => "prompt",
                    TokenizeInput::Messages { .. } => "messages",
                };
                self.fit_bytes(call.input.bytes_max(), param)?;
                let (text, call, len) = (self.text.clone(), call.clone(), self.model_len);
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

/// Tokenizer and chat template, wherever this kind of model has them.
fn text_of(file: &ModelFile, path: &Path) -> Result<TextModel, StartError> {
    match (file.gguf(), file.directory()) {
        (Some(gguf), _) => {
            text::text_model(gguf).map_err(|source| StartError::Text { path: path.into(), source })
        }
        (None, directory) => hf_text::text_model(directory.unwrap_or(path))
            .map_err(|source| StartError::HfText { path: path.into(), source: Box::new(source) }),
    }
}

fn generation_of(
    config: &EngineConfig,
    file: &ModelFile,
    path: &Path,
) -> Result<GenerationDefaults, StartError> {
    let over = &config.override_generation_config;
    GenerationDefaults::of(file.directory(), &config.generation_config, over)
        .map_err(|source| StartError::Generation { path: path.into(), source: Box::new(source) })
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

pub(super) fn overloaded() -> Fault {
    let class = Class::new(Code::Overloaded, Blame::Us).retry(Retry::After(RETRY_AFTER));
    Fault::new(
        class,
        format!("the engine's inbox is full: {INBOX_MAX} requests arrived within one step; try again later"),
    )
}

/// Seeds of requests that bring none.
struct Seeds {
    /// The first of a sequence; `None` is a random one each.
    first: Option<u64>,
    given: AtomicU64,
}

impl Seeds {
    /// 2^64 divided by the golden ratio: consecutive seeds, and those of their choices, keep apart.
    const STEP: u64 = 0x9e37_79b9_7f4a_7c15;

    fn new(first: Option<u64>) -> Self {
        Self { first, given: AtomicU64::new(0) }
    }

    fn next(&self) -> Result<u64, Fault> {
        match self.first {
            Some(first) => {
                let nth = self.given.fetch_add(1, Ordering::Relaxed);
                Ok(first.wrapping_add(nth.wrapping_mul(Self::STEP)))
            }
            None => getrandom::u64().map_err(|error| Fault::internal(format!("no randomness: {error}"))),
        }
    }
}

fn token_bytes_max(text: &TextModel) -> usize {
    let tokenizer = text.tokenizer();
    (0..tokenizer.vocab_size() as TokenId).map(|id| tokenizer.token_bytes(id).len()).max().unwrap_or(0)
}
