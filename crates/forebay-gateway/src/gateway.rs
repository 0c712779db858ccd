//! The stage itself: admits a request, or says why not.

use std::collections::HashSet;
use std::num::NonZeroU64;
use std::sync::Arc;
use std::time::{Duration, Instant};

use forebay_config::Environment;
use forebay_flow::{
    Admitted, Caller, FAIRNESS_ID, Flow, Origin, PromptEncoder, PromptIds, Received, Reply, Stage,
};
use forebay_observe::{Layer, Registry};
use forebay_quota::{Hold, Ledger, Limits, Refused};
use forebay_types::{ConsumerName, Fault, ModelName};
use forebay_wire::{Api, Ask, Generate, ParseError, RenderSpec, check_encoding, error_row, parse};
use http::{HeaderName, HeaderValue, Method, header};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};

use crate::account::Account;
use crate::audit::{AuditLog, AuditSlot};
use crate::clock::Clock;
use crate::error::DeniedError;
use crate::keys::KeyRing;
use crate::metered::Metered;
use crate::metrics::{Metrics, UNKNOWN};
use crate::salt::Salts;
use crate::{ConsumerConfig, GatewayBuildError, GatewayConfig, ratelimit};

/// Limits are per minute.
const WINDOW: Duration = Duration::from_secs(60);
/// Bodies longer than this are parsed and tokenized off the I/O threads. Both run at some 10 to 100 MB/s, so 4 KiB is
/// where they begin to take 100 µs.
const INLINE_BODY_BYTES_MAX: usize = 4096;
/// What OpenAI and vLLM generate at most for a completion that names no `max_tokens`.
const COMPLETION_TOKENS_DEFAULT: u32 = 16;

/// What the gateway needs from its surroundings.
pub struct GatewayDeps<'a> {
    pub encoder: Arc<dyn PromptEncoder>,
    pub registry: &'a Registry,
    /// The names of the only model that there is, its own first: what a request is for that names none. Empty where there
    /// are several models.
    pub only_model: Vec<ModelName>,
    /// Without a config of the gateway: callers are routers, and say in [`FAIRNESS_ID`] for whom they call.
    pub callers_are_routers: bool,
}

/// Longest name of a tenant that a router tells; one that is longer is not used.
const TENANT_BYTES_MAX: usize = 128;

/// `x-ratelimit-*`
type RateHeaders = Vec<(&'static str, String)>;

/// One consumer as the gateway knows it.
struct Consumer {
    name: ConsumerName,
    ledger: Ledger,
    models: Option<Arc<[ModelName]>>,
    /// Its long bodies that are read at a time, so that one consumer's can't keep all others waiting.
    reading: Arc<Semaphore>,
}

impl Consumer {
    fn may_use(&self, model: &ModelName) -> bool {
        self.models.as_ref().is_none_or(|models| models.contains(model))
    }
}

/// Who may come in.
enum Access {
    /// No `gateway` section: everybody, as `anonymous`, without limits.
    Open(Arc<Consumer>),
    Keys(KeyRing<Arc<Consumer>>),
}

/// L2. Turns `Received` into `Admitted`.
pub struct Gateway<Next> {
    access: Access,
    /// Where each consumer's prompts are cached apart.
    salts: Option<Salts>,
    encoder: Arc<dyn PromptEncoder>,
    /// Long bodies that are read at a time, of everybody. One per core: more would only take turns, and each takes some
    /// 40 times its own memory while it is tokenized.
    reading: Arc<Semaphore>,
    only_model: Vec<ModelName>,
    callers_are_routers: bool,
    audit: Option<AuditLog>,
    metrics: Metrics,
    clock: Clock,
    default_output_tokens: u32,
    next: Next,
}

impl<Next> Gateway<Next> {
    /// Resolves the keys and starts the audit log. Without a config the gateway is open: the consumer is `anonymous`,
    /// nothing is limited, and there is no audit.
    ///
    /// Blocking: reads secret files and makes the audit directory. Call it at start.
    pub fn new(
        config: Option<&GatewayConfig>,
        env: &dyn Environment,
        deps: GatewayDeps<'_>,
        next: Next,
    ) -> Result<Self, GatewayBuildError> {
        let metrics = Metrics::register(deps.registry)?;
        let clock = Clock::start();
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let (access, audit) = match config {
            None => {
                let consumer = Consumer {
                    name: "anonymous".into(),
                    ledger: Ledger::unlimited(),
                    models: None,
                    // It is everybody, so there is nobody to keep a core for.
                    reading: Arc::new(Semaphore::new(cores)),
                };
                (Access::Open(Arc::new(consumer)), None)
            }
            Some(config) => {
                let keys = key_ring(config, env, clock)?;
                let audit =
                    config.audit.as_ref().map(|audit| AuditLog::start(audit, &metrics)).transpose()?;
                (Access::Keys(keys), audit)
            }
        };
        let default_output_tokens =
            config.map_or(GatewayConfig::default().default_output_tokens, |c| c.default_output_tokens);
        Ok(Self {
            access,
            salts: config.map(|config| Salts::new(config, env)).transpose()?.flatten(),
            encoder: deps.encoder,
            reading: Arc::new(Semaphore::new(cores)),
            only_model: deps.only_model,
            callers_are_routers: deps.callers_are_routers,
            audit,
            metrics,
            clock,
            default_output_tokens,
            next,
        })
    }

    /// Waits until the audit records of all requests that have ended are written. Call it before the process ends.
    pub async fn flush_audit(&self) {
        if let Some(audit) = &self.audit {
            audit.flush().await;
        }
    }

    async fn audit_slot(&self) -> Result<AuditSlot, Fault> {
        match &self.audit {
            None => Ok(AuditSlot::Off),
            Some(audit) => audit.slot().await.map_err(|error| {
                self.metrics.audit_refused.inc();
                let fault = Fault::from(error);
                self.metrics.request(UNKNOWN, error_row(fault.class.code).name);
                fault
            }),
        }
    }

    /// Everything up to the hold.
    async fn admit(
        &self,
        origin: &Arc<Origin>,
        received: Received,
        account: &mut Account,
    ) -> Result<(Admitted, RateHeaders), Fault> {
        let start = Instant::now();
        let consumer = match &self.access {
            Access::Open(consumer) => consumer,
            Access::Keys(keys) => keys.identify(&received.headers)?,
        };
        account.identified(&consumer.name);
        origin.trace.note(Layer::Gateway, "authenticate", start, format!("consumer {}", consumer.name));
        let tenant = self.tenant(consumer, &received.headers);

        // The request is taken before anything is done for it, so that it costs also where it is refused, and somebody who
        // has nothing left gets no work out of us. How many tokens it needs is known only after that work.
        let mut hold = self.hold(consumer, if may_compute(&received) { 1 } else { 0 })?;
        let (mut ask, ids) = self.understand(origin, consumer, received, account).await?;

        // Not for what is only rendered: the client sends that back to be generated, and then it is salted.
        if let (Some(salts), Ask::Generate(call)) = (&self.salts, &mut ask) {
            call.cache_salt = Some(salts.of(&consumer.name, call.cache_salt.as_deref()));
        }

        let start = Instant::now();
        let tokens = match &ask {
            Ask::Generate(call) => tokens_max(call, &ids, self.default_output_tokens),
            Ask::Embed(_) => u64::from(ids.tokens()),
            Ask::Render(_)
            | Ask::Tokenize(_)
            | Ask::Detokenize(_)
            | Ask::TokenizerInfo
            | Ask::ListModels
            | Ask::GetModel(_) => 0,
        };
        if let Err(refused) = hold.try_resize(self.clock.now(), tokens) {
            drop(hold);
            return Err(self.refuse(consumer, refused));
        }
        // What is left right after the hold, as OpenAI tells it: not what is left when the reply ends.
        let left = consumer.ledger.snapshot(self.clock.now());
        origin.trace.note(
            Layer::Gateway,
            "reserve",
            start,
            format!("{tokens} tokens; {}", ratelimit::left(&left)),
        );
        let held = hold.proof();
        account.dispatched(hold, ask.prompt().is_some().then_some(&ids));
        let caller = Caller { consumer: tenant, models: consumer.models.clone() };
        Ok((Admitted { caller, ask, ids, held }, ratelimit::headers(&left)))
    }

    /// For whom the layers below work: where the caller is a router, whom it names.
    fn tenant(&self, consumer: &Consumer, headers: &http::HeaderMap) -> ConsumerName {
        let told = match (&self.access, self.callers_are_routers) {
            (Access::Open(_), true) => headers.get(FAIRNESS_ID).and_then(|value| value.to_str().ok()),
            _ => None,
        };
        let told = told.filter(|name| (1..=TENANT_BYTES_MAX).contains(&name.len()));
        told.map_or_else(|| consumer.name.clone(), ConsumerName::from)
    }

    fn hold(&self, consumer: &Consumer, tokens: u64) -> Result<Hold, Fault> {
        let held = consumer.ledger.try_hold(self.clock.now(), tokens);
        held.map_err(|refused| self.refuse(consumer, refused))
    }

    fn refuse(&self, consumer: &Consumer, refused: Refused) -> Fault {
        self.metrics.refuse(consumer.name.as_str(), refused.limited);
        let mut fault = Fault::from(refused);
        fault.headers.extend(ratelimit::headers(&consumer.ledger.snapshot(self.clock.now())));
        fault
    }

    /// Parses the body and counts its tokens: here if it is short, else on a thread for blocking work.
    async fn understand(
        &self,
        origin: &Arc<Origin>,
        consumer: &Arc<Consumer>,
        received: Received,
        account: &mut Account,
    ) -> Result<(Ask, PromptIds), Fault> {
        let inline = received.body.len() <= INLINE_BODY_BYTES_MAX;
        let encoder = Arc::clone(&self.encoder);
        let permits = if inline { None } else { Some(self.read_permits(consumer).await) };
        let (origin, consumer) = (Arc::clone(origin), Arc::clone(consumer));
        let default = self.only_model.iter().find(|model| consumer.may_use(model)).cloned();
        let read = move |is_wanted: &dyn Fn() -> bool| {
            let start = Instant::now();
            let ask = read(&received, default.as_ref())?;
            origin.trace.note(Layer::Gateway, "parse", start, format!("{} bytes", received.body.len()));
            // The model goes back also where the rest fails: the audit log names it.
            let model = ask.model().cloned();
            let encoded = || {
                may_use(&consumer, &ask)?;
                encode(&*encoder, &origin, ask, is_wanted)
            };
            Ok::<_, Fault>((model, encoded()))
        };
        let read = match permits {
            None => read(&|| true),
            Some(permits) => {
                let (done, result) = oneshot::channel();
                tokio::task::spawn_blocking(move || {
                    // Work that has begun can't be interrupted: the permits stay with it where the client has left meanwhile.
                    if !done.is_closed() {
                        let read = read(&|| !done.is_closed());
                        // Before the answer: whoever has it finds the next turn free.
                        drop(permits);
                        let _ = done.send(read);
                    }
                });
                result
                    .await
                    .unwrap_or_else(|_| Err(Fault::internal("the thread that read the request is gone")))
            }
        };
        let (model, understood) = read?;
        account.asked_for(model.as_ref());
        understood
    }

    /// Waits for this consumer's turn, and then for a core. A client that leaves while it waits takes nothing.
    async fn read_permits(&self, consumer: &Consumer) -> [OwnedSemaphorePermit; 2] {
        // In this order: who waits for the own turn must not hold what others could use.
        let own = Arc::clone(&consumer.reading).acquire_owned().await.expect("never closed");
        let core = Arc::clone(&self.reading).acquire_owned().await.expect("never closed");
        [own, core]
    }
}

impl<Next: Stage<Admitted>> Stage<Received> for Gateway<Next> {
    async fn call(&self, flow: Flow<Received>) -> Result<Reply, Fault> {
        let Flow { origin, stage: received } = flow;
        let slot = self.audit_slot().await?;
        let mut account =
            Account::open(Arc::clone(&origin), self.clock, self.metrics.clone(), slot, &received.path);
        let (admitted, limits) = match self.admit(&origin, received, &mut account).await {
            Ok(admitted) => admitted,
            Err(fault) => {
                account.close_failed(&fault);
                return Err(fault);
            }
        };
        let render = match &admitted.ask {
            Ask::Generate(call) => Some(RenderSpec::new(call)),
            // Their answer is one body that is rendered below.
            Ask::Embed(_)
            | Ask::Render(_)
            | Ask::Tokenize(_)
            | Ask::Detokenize(_)
            | Ask::TokenizerInfo
            | Ask::ListModels
            | Ask::GetModel(_) => None,
        };
        let mut reply = match self.next.call(Flow::new(origin, admitted)).await {
            Ok(reply) => reply,
            Err(fault) => {
                account.close_failed(&fault);
                return Err(fault);
            }
        };
        for (name, value) in limits {
            if let Ok(value) = HeaderValue::from_str(&value) {
                // Ours, not those of an upstream whose account is ours and not the client's.
                reply.headers.insert(HeaderName::from_static(name), value);
            }
        }
        if let Some(render) = render {
            reply = reply.rendered_as(|| render);
        }
        account.replied();
        let form = reply.form;
        Ok(reply.map_chunks(|chunks| Box::pin(Metered::new(chunks, form, account))))
    }
}

/// Whether this can cost tokens, as far as the path says.
fn may_compute(received: &Received) -> bool {
    let ends = ["/completions", "/embeddings", "/generate"];
    received.method == Method::POST && ends.iter().any(|end| received.path.ends_with(end))
}

fn read(received: &Received, default_model: Option<&ModelName>) -> Result<Ask, Fault> {
    for encoding in received.headers.get_all(header::CONTENT_ENCODING) {
        check_encoding(Some(&String::from_utf8_lossy(encoding.as_bytes())))
            .map_err(ParseError::into_fault)?;
    }
    let content_type = received.headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok());
    parse(&received.method, &received.path, content_type, &received.body, default_model)
        .map_err(ParseError::into_fault)
}

/// Whether the consumer may use the model. A listing, a look at one model and what names none are filtered by the proxy: a
/// model that a caller may not use is not there for them.
fn may_use(consumer: &Consumer, ask: &Ask) -> Result<(), Fault> {
    let Some(models) = &consumer.models else { return Ok(()) };
    let model = match ask {
        Ask::ListModels | Ask::GetModel(_) | Ask::TokenizerInfo => return Ok(()),
        Ask::Generate(_) | Ask::Embed(_) | Ask::Render(_) | Ask::Tokenize(_) | Ask::Detokenize(_) => {
            ask.model()
        }
    };
    let consumer = consumer.name.clone();
    match model {
        Some(model) if models.contains(model) => Ok(()),
        Some(model) => Err(DeniedError::Model { consumer, model: model.clone() }.into()),
        None => Err(DeniedError::NoModel { consumer }.into()),
    }
}

fn encode(
    encoder: &dyn PromptEncoder,
    origin: &Origin,
    ask: Ask,
    is_wanted: &dyn Fn() -> bool,
) -> Result<(Ask, PromptIds), Fault> {
    let Some((model, prompt)) = ask.prompt() else { return Ok((ask, PromptIds::none())) };
    let start = Instant::now();
    // What is cut to the model's limit fits it, however long it is.
    if !matches!(&ask, Ask::Embed(call) if call.truncate_prompt_tokens.is_some()) {
        encoder.fits(model, prompt)?;
    }
    if !is_wanted() {
        return Err(Fault::internal("the client left"));
    }
    let ids = match &ask {
        Ask::Generate(call) => encoder.encode(call)?,
        Ask::Embed(call) => encoder.encode_inputs(call)?,
        Ask::Render(_)
        | Ask::Tokenize(_)
        | Ask::Detokenize(_)
        | Ask::TokenizerInfo
        | Ask::ListModels
        | Ask::GetModel(_) => PromptIds::none(),
    };
    let how = if matches!(ids, PromptIds::Exact { .. }) { "exact" } else { "estimated" };
    origin.trace.note(Layer::Gateway, "tokenize", start, format!("{} tokens, {how}", ids.tokens()));
    Ok((ask, ids))
}

/// The most a call may use, as far as it says: prompt and all choices.
fn tokens_max(call: &Generate, ids: &PromptIds, default_output_tokens: u32) -> u64 {
    let default = match call.api {
        Api::ChatCompletions | Api::Tokens => default_output_tokens,
        Api::Completions => COMPLETION_TOKENS_DEFAULT,
    };
    let output = u64::from(call.max_tokens.unwrap_or(default));
    let choices = call.prompt.count() as u64 * u64::from(call.n);
    u64::from(ids.tokens()).saturating_add(choices.saturating_mul(output))
}

fn key_ring(
    config: &GatewayConfig,
    env: &dyn Environment,
    clock: Clock,
) -> Result<KeyRing<Arc<Consumer>>, GatewayBuildError> {
    if config.consumers.is_empty() {
        return Err(GatewayBuildError::NoConsumers);
    }
    let mut ring = KeyRing::new(config.key_bytes_max).map_err(GatewayBuildError::Random)?;
    let mut names = HashSet::new();
    for (i, section) in config.consumers.iter().enumerate() {
        let at = |field: &str| format!("gateway.consumers[{i}].{field}");
        if section.name.is_empty() {
            return Err(GatewayBuildError::NoName { at: at("name") });
        }
        if !names.insert(section.name.as_str()) {
            return Err(GatewayBuildError::DuplicateConsumer { at: at("name"), name: section.name.clone() });
        }
        if section.keys.is_empty() {
            return Err(GatewayBuildError::NoKeys { at: at("keys") });
        }
        if section.models.as_ref().is_some_and(Vec::is_empty) {
            return Err(GatewayBuildError::NoModels { at: at("models") });
        }
        let consumer = Arc::new(consumer(section, clock));
        for (k, secret) in section.keys.iter().enumerate() {
            let at = at(&format!("keys[{k}]"));
            let key = match secret.resolve(env) {
                Ok(key) => key,
                Err(source) => return Err(GatewayBuildError::Secret { at, source }),
            };
            if key.expose().len() > config.key_bytes_max {
                return Err(GatewayBuildError::KeyTooLong { at, limit: config.key_bytes_max });
            }
            if !key.expose().bytes().all(|byte| byte.is_ascii_graphic()) {
                return Err(GatewayBuildError::KeyNotSendable { at });
            }
            if let Err(other) = ring.add(key.expose(), Arc::clone(&consumer)) {
                return Err(GatewayBuildError::SharedKey { at, other: other.name.to_string() });
            }
        }
    }
    Ok(ring)
}

fn consumer(section: &ConsumerConfig, clock: Clock) -> Consumer {
    let limits = Limits {
        requests: section.limits.requests_per_minute.map(NonZeroU64::get),
        tokens: section.limits.tokens_per_minute.map(NonZeroU64::get),
    };
    let models = section.models.as_ref();
    Consumer {
        name: section.name.as_str().into(),
        ledger: Ledger::new(limits, WINDOW, clock.now()),
        models: models.map(|models| models.iter().map(|model| ModelName::from(model.as_str())).collect()),
        reading: Arc::new(Semaphore::new(1)),
    }
}

#[cfg(test)]
mod tests;
