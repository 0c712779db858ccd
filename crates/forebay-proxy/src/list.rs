//! `GET /v1/models` and `GET /v1/models/{id}`.

use forebay_flow::{Caller, Reply};
use forebay_types::ModelName;
use forebay_wire::{ModelCard, render_model, render_models};

use crate::build::Model;

/// Whether a caller may know of a model.
pub(crate) fn may_see(caller: &Caller, model: &ModelName) -> bool {
    caller.models.as_ref().is_none_or(|models| models.contains(model))
}

/// The models that the caller may use, in the order of the file.
pub(crate) fn list(models: &[Model], caller: &Caller) -> Reply {
    let cards: Vec<ModelCard> =
        models.iter().filter(|model| may_see(caller, &model.name)).map(|model| model.card.clone()).collect();
    Reply::json(render_models(&cards))
}

pub(crate) fn card(model: &Model) -> Reply {
    Reply::json(render_model(&model.card))
}
