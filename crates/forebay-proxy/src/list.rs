//! `GET /v1/models` and `GET /v1/models/{id}`.

use forebay_flow::{Caller, Reply};
use forebay_types::ModelName;
use forebay_wire::{ModelCard, render_model, render_models};

use crate::build::Model;

/// Whether a caller may know of a model.
pub(crate) fn may_see(caller: &Caller, model: &ModelName) -> bool {
    caller.models.as_ref().is_none_or(|models| models.contains(model))
}

/// The models that the caller may use, in the order of the file, each followed by its aliases.
pub(crate) fn list(models: &[Model], caller: &Caller) -> Reply {
    let names = models.iter().flat_map(|model| model.names().map(move |name| (model, name)));
    let cards: Vec<ModelCard> =
        names.filter(|(_, name)| may_see(caller, name)).map(|(model, name)| under(name, model)).collect();
    Reply::json(render_models(&cards))
}

/// A model by the name that was asked for.
pub(crate) fn card(model: &Model, name: &ModelName) -> Reply {
    Reply::json(render_model(&under(name, model)))
}

fn under(name: &ModelName, model: &Model) -> ModelCard {
    ModelCard { id: name.clone(), ..model.card.clone() }
}
