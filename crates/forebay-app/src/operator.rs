//! What operators and routers ask this process about its engines, in vLLM's shape: for the edge of a worker, and for the
//! admin listener of everybody.
//!
//! **Where it is open:** on a worker's port as in vLLM, because only a router reaches that port; on the edge of
//! `serve` only with `edge.operator-api: on`, because whoever can pause an engine can stop everybody's answers. The admin
//! listener always has it.

use std::sync::Arc;

use forebay_edge::{Operator, OperatorAsk, OperatorFuture, OperatorLoad, operator_method};
use forebay_engine::{Aborted, Engine, ModelEngine, PauseMode, Stopped};
use forebay_types::{Blame, Class, Code, Fault, RequestId, Retry};
use serde_json::{Value, json};

use crate::slots::Slot;

/// Request ids in one `/abort_requests`.
const IDS_MAX: usize = 10_000;

/// vLLM's operator endpoints, over all engines of the process.
pub struct OperatorApi {
    slots: Vec<Arc<Slot>>,
}

impl OperatorApi {
    pub fn new(slots: Vec<Arc<Slot>>) -> Self {
        Self { slots }
    }

    fn engines(&self) -> Vec<Arc<ModelEngine>> {
        self.slots.iter().filter_map(|slot| slot.engine()).collect()
    }

    /// Publishers by their rank, as vLLM's ranks of data parallelism: here each engine is one.
    fn kv_event_sources(&self) -> Value {
        let sources = self.slots.iter().enumerate().filter_map(|(rank, slot)| {
            let engine = slot.engine()?;
            let source = engine.generating()?.kv_event_source()?;
            let source = json!({
                "enable_kv_cache_events": true,
                "publisher": "zmq",
                "endpoint": source.endpoint,
                "replay_endpoint": source.replay_endpoint,
                "topic": source.topic,
                "model_name": slot.model().as_str(),
            });
            Some((rank.to_string(), source))
        });
        Value::Object(sources.collect())
    }
}

impl Operator for OperatorApi {
    fn answer(&self, ask: OperatorAsk) -> OperatorFuture<Result<Option<Value>, Fault>> {
        let Some(allow) = operator_method(&ask.path) else {
            let fault = Fault::new(Class::new(Code::RouteNotFound, Blame::Client), "no such path");
            return Box::pin(std::future::ready(Err(fault)));
        };
        if ask.method != allow {
            let class = Class::new(Code::MethodNotAllowed, Blame::Client);
            let message = format!("{} is for {allow}, not for {}", ask.path, ask.method);
            let fault = Fault::new(class, message).header("allow", allow.to_string());
            return Box::pin(std::future::ready(Err(fault)));
        }
        let engines = self.engines();
        let sources = self.kv_event_sources();
        Box::pin(async move {
            match ask.path.as_str() {
                "/kv_event_sources" => Ok(Some(sources)),
                "/is_paused" => {
                    let paused = generating(&engines).any(Engine::is_paused);
                    Ok(Some(json!({"is_paused": paused})))
                }
                "/abort_requests" => {
                    let ids = parse_ids(&ask.body)?;
                    abort(&engines, &Aborted::ids(ids)).await?;
                    Ok(None)
                }
                "/pause" => {
                    let (mode, clear_cache) = parse_pause(ask.query.as_deref())?;
                    for engine in generating(&engines) {
                        engine.pause(mode, clear_cache).await.map_err(stopped)?;
                    }
                    Ok(Some(json!({"status": "paused"})))
                }
                _ => {
                    for engine in generating(&engines) {
                        engine.resume().await.map_err(stopped)?;
                    }
                    Ok(Some(json!({"status": "resumed"})))
                }
            }
        })
    }

    fn load(&self) -> Option<OperatorLoad> {
        let engines = self.engines();
        generating(&engines)
            .map(Engine::load)
            .map(|load| OperatorLoad { kv_cache_usage: load.kv_usage, requests_waiting: load.waiting })
            .reduce(|a, b| OperatorLoad {
                kv_cache_usage: a.kv_cache_usage.max(b.kv_cache_usage),
                requests_waiting: a.requests_waiting + b.requests_waiting,
            })
    }

    fn abort_all(&self) -> OperatorFuture<bool> {
        let engines = self.engines();
        Box::pin(async move {
            for engine in &engines {
                // One that has stopped has told its clients.
                let _ = engine.abort(Aborted::All).await;
            }
            !engines.is_empty()
        })
    }
}

/// Those that can be paused.
fn generating(engines: &[Arc<ModelEngine>]) -> impl Iterator<Item = &Engine> {
    engines.iter().filter_map(|engine| engine.generating())
}

async fn abort(engines: &[Arc<ModelEngine>], which: &Aborted) -> Result<(), Fault> {
    for engine in engines {
        engine.abort(which.clone()).await.map_err(stopped)?;
    }
    Ok(())
}

fn stopped(error: Stopped) -> Fault {
    let class = Class::new(Code::ModelUnavailable, Blame::Us).retry(Retry::Elsewhere);
    Fault::new(class, error.to_string())
}

/// `{"request_ids": [ID…]}`, or one id.
fn parse_ids(body: &[u8]) -> Result<Vec<RequestId>, Fault> {
    let wrong = |message: String| Fault::bad_request(message).param("request_ids");
    let body: Value = serde_json::from_slice(body)
        .map_err(|error| Fault::bad_request(format!("JSON decode error: {error}")))?;
    let ids = match body.get("request_ids") {
        None | Some(Value::Null) => {
            return Err(wrong("Missing 'request_ids' in request body".to_owned()));
        }
        Some(Value::String(id)) => return Ok(vec![id.as_str().into()]),
        Some(Value::Array(ids)) if ids.len() <= IDS_MAX => ids,
        Some(Value::Array(ids)) => {
            return Err(wrong(format!("'request_ids' has {} entries; the limit is {IDS_MAX}", ids.len())));
        }
        Some(_) => return Err(wrong("'request_ids' must be a list of strings".to_owned())),
    };
    let id = |id: &Value| {
        let id = id.as_str().ok_or_else(|| wrong("'request_ids' must be a list of strings".to_owned()))?;
        Ok(id.into())
    };
    ids.iter().map(id).collect()
}

/// `mode` and `clear_cache`; `wait_for_inflight_requests` is an older name of `mode=wait`.
fn parse_pause(query: Option<&str>) -> Result<(PauseMode, bool), Fault> {
    let (mut mode, mut clear_cache) = (PauseMode::Abort, true);
    let flag = |name: &str, value: &str| match value.to_ascii_lowercase().as_str() {
        "true" | "1" => Ok(true),
        "false" | "0" => Ok(false),
        _ => Err(Fault::bad_request(format!("'{name}' must be true or false")).param(name)),
    };
    for (name, value) in query.unwrap_or_default().split('&').filter_map(|pair| pair.split_once('=')) {
        match name {
            "mode" => {
                mode = match value {
                    "abort" => PauseMode::Abort,
                    "wait" => PauseMode::Wait,
                    "keep" => PauseMode::Keep,
                    _ => {
                        let message = "Invalid pause mode. Must be one of ['abort', 'wait', 'keep'].";
                        return Err(Fault::bad_request(message).param("mode"));
                    }
                }
            }
            "clear_cache" => clear_cache = flag(name, value)?,
            "wait_for_inflight_requests" if flag(name, value)? => mode = PauseMode::Wait,
            _ => {}
        }
    }
    Ok((mode, clear_cache))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_to_abort() {
        let check = |body: &str, expect: Result<&[&str], &str>| {
            let read = parse_ids(body.as_bytes());
            let ids = read.as_ref().map(|ids| ids.iter().map(RequestId::as_str).collect::<Vec<_>>());
            match expect {
                Ok(expect) => assert_eq!(ids.ok(), Some(expect.to_vec()), "{body}"),
                Err(expect) => assert!(ids.unwrap_err().message.contains(expect), "{body}: {read:?}"),
            }
        };
        check(r#"{"request_ids": ["a", "b"]}"#, Ok(&["a", "b"]));
        check(r#"{"request_ids": "a"}"#, Ok(&["a"]));
        check(r#"{"request_ids": []}"#, Ok(&[]));
        check("{}", Err("Missing 'request_ids'"));
        check(r#"{"request_ids": null}"#, Err("Missing 'request_ids'"));
        check("[1]", Err("Missing 'request_ids'"));
        check(r#"{"request_ids": [1]}"#, Err("list of strings"));
        check("{", Err("JSON decode error"));
        let many = serde_json::json!({"request_ids": vec!["x"; IDS_MAX + 1]}).to_string();
        check(&many, Err("the limit is 10000"));
    }

    #[test]
    fn how_to_pause() {
        let check = |query: &str, expect: Option<(PauseMode, bool)>| {
            assert_eq!(parse_pause(Some(query)).ok(), expect, "{query}");
        };
        check("", Some((PauseMode::Abort, true)));
        check("mode=keep&clear_cache=false", Some((PauseMode::Keep, false)));
        check("wait_for_inflight_requests=True", Some((PauseMode::Wait, true)));
        check("mode=sleep", None);
        check("clear_cache=maybe", None);
    }
}
