//! What a Hugging Face `config.json` says about the shape of the model.
//!
//! Keys and defaults are those of the configuration classes of transformers 5 (and of 4, whose keys for rotation are
//! older): what a file leaves out is what that class would fill in.

use super::keys::{Keys, SIZE_MAX};
use super::spec::{Heads, check_rotary, layer_table};
use super::{Activation, Family, HfConfig, LayerAttention, ModelSpec, Rope, RopeLayout, SpecError};

/// Which layers see a window only.
#[derive(Clone, Copy, PartialEq)]
enum Windows {
    /// `sliding_window` is not looked at.
    Never,
    /// `sliding_window`, 4096 where it is absent, none where it is null.
    Always,
    /// Only with `use_sliding_window`; by `layer_types`, or from layer `max_window_layers` on.
    OnRequest,
    /// By `layer_types`, or all but each `sliding_window_pattern`-th.
    Pattern,
}

/// One entry of `architectures` that we run.
struct Architecture {
    name: &'static str,
    family: &'static str,
    windows: Windows,
    /// Defaults of `tie_word_embeddings`, `rope_theta` and `head_dim` (`None`: a head's share of `hidden_size`).
    tied: bool,
    rope_base: f32,
    head_dim: Option<usize>,
}

const PLAIN: Architecture = Architecture {
    name: "",
    family: "",
    windows: Windows::Never,
    tied: false,
    rope_base: 10_000.0,
    head_dim: None,
};

const ARCHITECTURES: &[Architecture] = &[
    Architecture { name: "LlamaForCausalLM", family: "llama", ..PLAIN },
    Architecture { name: "MistralForCausalLM", family: "llama", windows: Windows::Always, ..PLAIN },
    Architecture { name: "Qwen2ForCausalLM", family: "qwen2", windows: Windows::OnRequest, ..PLAIN },
    Architecture {
        name: "Qwen3ForCausalLM",
        family: "qwen3",
        windows: Windows::OnRequest,
        head_dim: Some(128),
        ..PLAIN
    },
    Architecture {
        name: "Gemma3ForCausalLM",
        family: "gemma3",
        windows: Windows::Pattern,
        tied: true,
        rope_base: 1_000_000.0,
        head_dim: Some(256),
    },
];

/// Windows of Mistral, Qwen and Gemma where the file names none.
const WINDOW: usize = 4096;
/// `max_window_layers` and `sliding_window_pattern`.
const WINDOW_LAYERS: usize = 28;
const WINDOW_PERIOD: usize = 6;
const EPS: f32 = 1e-6;

/// Names of a layer's kind of attention.
const FULL: &str = "full_attention";
const SLIDING: &str = "sliding_attention";

pub(super) fn read(config: &HfConfig) -> Result<ModelSpec, SpecError> {
    let keys = Keys { metadata: config, prefix: String::new() };
    let architecture = architecture(config)?;
    let family = Family::find(architecture.family).expect("the table has families of ours only");
    // Only files of llama.cpp have their rows interleaved.
    let family = Family { rope: RopeLayout::HalfSplit, ..family };
    if config.is_object("quantization_config") {
        let method = keys.optional_text("quantization_config.quant_method")?;
        let what = format!("a quantisation by `{}`", method.as_deref().unwrap_or("unknown"));
        return Err(SpecError::Unsupported { what });
    }
    if keys.optional_flag("use_bidirectional_attention")? == Some(true) {
        return Err(SpecError::Unsupported { what: "attention in both directions".to_owned() });
    }
    keys.no_soft_cap("final_logit_softcapping", "logits")?;
    keys.no_soft_cap("attn_logit_softcapping", "scores")?;
    activation(&keys, &family)?;

    let dim = keys.size("hidden_size")?;
    let q_heads = keys.size("num_attention_heads")?;
    let head_dim = keys.optional_size("head_dim")?.or(architecture.head_dim);
    let Heads { kv_heads, head_dim } =
        Heads::of(dim, q_heads, keys.optional_size("num_key_value_heads")?, head_dim)?;
    let layers = keys.layers("num_hidden_layers")?;
    let (rope, rope_factors) = rope(&keys, architecture, head_dim)?;
    if rope_factors.is_some() && architecture.windows == Windows::Pattern {
        return Err(SpecError::Unsupported {
            what: "rope scaling of type `llama3` beside windows".to_owned(),
        });
    }
    let trained = keys.size("max_position_embeddings")?;
    // Positions that are divided by 4 reach four times as far; a Gemma's limit has that in it already.
    let context_len = match architecture.windows {
        Windows::Pattern => trained,
        _ => ((trained as f32 * rope.linear_factor.max(1.0)) as usize).min(SIZE_MAX as usize),
    };
    let scale_dim = match family.name {
        "gemma3" => keys.optional_positive("query_pre_attn_scalar")?.unwrap_or(256.0),
        _ => head_dim as f32,
    };
    Ok(ModelSpec {
        attention: attention(&keys, architecture, &family, layers, &rope)?,
        family,
        name: None,
        layers,
        dim,
        ffn_dim: keys.size("intermediate_size")?,
        q_heads,
        kv_heads,
        head_dim,
        vocab_size: keys.size("vocab_size")?,
        context_len,
        rms_eps: keys.optional_positive("rms_norm_eps")?.unwrap_or(EPS),
        rope,
        rope_factors,
        attention_scale: 1.0 / scale_dim.sqrt(),
        tied_embeddings: keys.optional_flag("tie_word_embeddings")?.unwrap_or(architecture.tied),
    })
}

fn architecture(config: &HfConfig) -> Result<&'static Architecture, SpecError> {
    let key = || "architectures".to_owned();
    let Some(names) = config.texts("architectures") else {
        return Err(SpecError::Missing { key: key() });
    };
    let Some(&name) = names.first() else {
        let expected = "the name of an architecture";
        return Err(SpecError::Range { key: key(), value: "empty".to_owned(), expected });
    };
    ARCHITECTURES.iter().find(|known| known.name == name).ok_or_else(|| SpecError::Architecture {
        name: name.to_owned(),
        supported: ARCHITECTURES.iter().map(|known| known.name).collect::<Vec<_>>().join(", "),
    })
}

fn activation(keys: &Keys<'_, HfConfig>, family: &Family) -> Result<(), SpecError> {
    let given = match keys.optional_text("hidden_activation")? {
        Some(given) => Some(given),
        None => keys.optional_text("hidden_act")?,
    };
    let Some(given) = given else { return Ok(()) };
    let ours = match given.as_str() {
        "silu" | "swish" => Some(Activation::Silu),
        "gelu_pytorch_tanh" => Some(Activation::GeluTanh),
        _ => None,
    };
    if ours != Some(family.activation) {
        return Err(SpecError::Unsupported {
            what: format!("the activation `{given}` in this architecture"),
        });
    }
    Ok(())
}

/// The key of an object with the rotation's parameters of layers of one kind: transformers 5 has them together, or one
/// object for each kind of layer.
fn parameters(config: &HfConfig, kind: &str) -> Option<String> {
    let own = format!("rope_parameters.{kind}");
    if config.is_object(&own) {
        return Some(own);
    }
    config.is_object("rope_parameters").then(|| "rope_parameters".to_owned())
}

type Factors = Option<Vec<f32>>;

/// Rotation of layers without a window, and what its frequencies are divided by one by one.
fn rope(
    keys: &Keys<'_, HfConfig>,
    architecture: &Architecture,
    head_dim: usize,
) -> Result<(Rope, Factors), SpecError> {
    let config = keys.metadata;
    let parameters = parameters(config, FULL).map(|key| key + ".");
    // The older key goes first where a file has both, as in transformers.
    let scaling = match config.is_object("rope_scaling") {
        true => Some("rope_scaling.".to_owned()),
        false => parameters.clone(),
    };
    let scaling = scaling.map(|prefix| Keys { metadata: config, prefix });
    let parameters = parameters.map(|prefix| Keys { metadata: config, prefix });

    let mut base = None;
    for keys in [scaling.as_ref(), parameters.as_ref(), Some(keys)].into_iter().flatten() {
        base = base.or(keys.optional_positive("rope_theta")?);
    }
    let base = base.unwrap_or(architecture.rope_base);
    let partial = match &parameters {
        Some(parameters) => parameters.optional_positive("partial_rotary_factor")?,
        None => None,
    };
    let partial = partial.or(keys.optional_positive("partial_rotary_factor")?).unwrap_or(1.0);
    let dims = (head_dim as f32 * partial) as usize;
    check_rotary(dims, head_dim)?;

    let mut rope = Rope { layout: RopeLayout::HalfSplit, dims, base, linear_factor: 1.0 };
    let Some(scaling) = scaling else { return Ok((rope, None)) };
    match rope_type(&scaling)?.as_deref() {
        None | Some("default") => Ok((rope, None)),
        Some("linear") => {
            rope.linear_factor = factor(&scaling)?;
            Ok((rope, None))
        }
        Some("llama3") => {
            let factors = llama3(&scaling, &rope)?;
            Ok((rope, Some(factors)))
        }
        Some(other) => Err(SpecError::Unsupported { what: format!("rope scaling of type `{other}`") }),
    }
}

/// `rope_type`; older files call it `type`.
fn rope_type(keys: &Keys<'_, HfConfig>) -> Result<Option<String>, SpecError> {
    match keys.optional_text("rope_type")? {
        Some(name) => Ok(Some(name)),
        None => keys.optional_text("type"),
    }
}

/// How many times further positions reach.
fn factor(keys: &Keys<'_, HfConfig>) -> Result<f32, SpecError> {
    let factor = keys.positive("factor")?;
    if factor < 1.0 {
        let (key, _) = keys.get("factor");
        return Err(SpecError::Range { key, value: factor.to_string(), expected: "1 or more" });
    }
    Ok(factor)
}

/// Llama 3.1's context extension: long waves are stretched by `factor`, short ones are left, those between are mixed.
///
/// Source: `_compute_llama3_parameters` of transformers' `modeling_rope_utils.py`.
fn llama3(keys: &Keys<'_, HfConfig>, rope: &Rope) -> Result<Vec<f32>, SpecError> {
    let factor = factor(keys)?;
    let (low, high) = (keys.positive("low_freq_factor")?, keys.positive("high_freq_factor")?);
    let trained = keys.size("original_max_position_embeddings")? as f32;
    if high <= low {
        return Err(SpecError::Inconsistent {
            what: format!("a `high_freq_factor` of {high} is not above the `low_freq_factor` of {low}"),
        });
    }
    let divisor = |pair: usize| {
        let wavelength = std::f32::consts::TAU * rope.base.powf((2 * pair) as f32 / rope.dims as f32);
        if wavelength > trained / low {
            return factor;
        }
        if wavelength < trained / high {
            return 1.0;
        }
        let smooth = (trained / wavelength - low) / (high - low);
        1.0 / ((1.0 - smooth) / factor + smooth)
    };
    Ok((0..rope.dims / 2).map(divisor).collect())
}

/// The table of layers.
fn attention(
    keys: &Keys<'_, HfConfig>,
    architecture: &Architecture,
    family: &Family,
    layers: usize,
    rope: &Rope,
) -> Result<Vec<LayerAttention>, SpecError> {
    let none = || Ok(layer_table(&vec![false; layers], WINDOW, None, rope));
    let windowed = match architecture.windows {
        Windows::Never => return none(),
        Windows::Always => vec![true; layers],
        Windows::OnRequest if keys.optional_flag("use_sliding_window")? != Some(true) => return none(),
        Windows::OnRequest => {
            let first = keys.optional_size("max_window_layers")?.unwrap_or(WINDOW_LAYERS);
            layer_types(keys, layers)?.unwrap_or_else(|| (0..layers).map(|nth| nth >= first).collect())
        }
        Windows::Pattern => {
            let mut period = keys.optional_size("sliding_window_pattern")?;
            period = period.or(keys.optional_size("_sliding_window_pattern")?);
            let period = period.unwrap_or(WINDOW_PERIOD);
            let all_but = || (1..=layers).map(|nth| !nth.is_multiple_of(period)).collect();
            layer_types(keys, layers)?.unwrap_or_else(all_but)
        }
    };
    if keys.metadata.is_null("sliding_window") {
        return none();
    }
    let window = keys.optional_size("sliding_window")?.unwrap_or(WINDOW);
    let base = match family.window_rope_base {
        None => None,
        Some(default) => Some(window_base(keys)?.unwrap_or(default)),
    };
    Ok(layer_table(&windowed, window, base, rope))
}

/// The rotation's base in layers with a window, where it is another than elsewhere.
fn window_base(keys: &Keys<'_, HfConfig>) -> Result<Option<f32>, SpecError> {
    let prefix = format!("rope_parameters.{SLIDING}");
    if keys.metadata.is_object(&prefix) {
        let own = Keys { metadata: keys.metadata, prefix: prefix + "." };
        if let Some(other) = rope_type(&own)?.filter(|name| name != "default") {
            let what = format!("rope scaling of type `{other}` in layers with a window");
            return Err(SpecError::Unsupported { what });
        }
        if let Some(base) = own.optional_positive("rope_theta")? {
            return Ok(Some(base));
        }
    }
    keys.optional_positive("rope_local_base_freq")
}

/// Whether each layer has the window, where the file says it layer by layer.
fn layer_types(keys: &Keys<'_, HfConfig>, layers: usize) -> Result<Option<Vec<bool>>, SpecError> {
    let (key, Some(value)) = keys.get("layer_types") else { return Ok(None) };
    let Some(types) = keys.metadata.texts("layer_types") else {
        return Err(SpecError::Kind { key, found: value.kind(), expected: "a list of names" });
    };
    if types.len() != layers {
        return Err(SpecError::Inconsistent {
            what: format!("`{key}` has {} entries for {layers} layers", types.len()),
        });
    }
    let is_windowed = |name: &&str| match *name {
        FULL => Ok(false),
        SLIDING => Ok(true),
        other => Err(SpecError::Unsupported { what: format!("a layer of type `{other}`") }),
    };
    types.iter().map(is_windowed).collect::<Result<_, _>>().map(Some)
}
