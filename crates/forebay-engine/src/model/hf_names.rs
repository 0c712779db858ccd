//! Names of tensors: those of a Hugging Face directory and the ones that we know them by, which are ggml's.

use super::Family;

/// Ours and theirs, without `.weight` or `.bias`, of what stands outside the layers.
const TOP: &[(&str, &str)] =
    &[("token_embd", "model.embed_tokens"), ("output_norm", "model.norm"), ("output", "lm_head")];

/// Of a layer.
const LAYER: &[(&str, &str)] = &[
    ("attn_norm", "input_layernorm"),
    ("attn_q", "self_attn.q_proj"),
    ("attn_k", "self_attn.k_proj"),
    ("attn_v", "self_attn.v_proj"),
    ("attn_q_norm", "self_attn.q_norm"),
    ("attn_k_norm", "self_attn.k_norm"),
    ("attn_output", "self_attn.o_proj"),
    ("ffn_gate", "mlp.gate_proj"),
    ("ffn_up", "mlp.up_proj"),
    ("ffn_down", "mlp.down_proj"),
];

/// The norm that others have before the MLP has the name that Gemma's after attention has.
const PLAIN_NORMS: &[(&str, &str)] = &[("ffn_norm", "post_attention_layernorm")];
const POST_NORMS: &[(&str, &str)] = &[
    ("post_attention_norm", "post_attention_layernorm"),
    ("ffn_norm", "pre_feedforward_layernorm"),
    ("post_ffw_norm", "post_feedforward_layernorm"),
];

fn layer(family: &Family) -> impl Iterator<Item = &'static (&'static str, &'static str)> {
    LAYER.iter().chain(if family.post_norms { POST_NORMS } else { PLAIN_NORMS })
}

/// `model.layers.3.mlp.up_proj.weight` is our `blk.3.ffn_up.weight`. `None` for what has no place in the family.
pub(super) fn ours(theirs: &str, family: &Family) -> Option<String> {
    let (stem, kind) = split(theirs)?;
    let Some(in_layer) = stem.strip_prefix("model.layers.") else {
        return TOP.iter().find(|pair| pair.1 == stem).map(|pair| format!("{}.{kind}", pair.0));
    };
    let (nth, part) = in_layer.split_once('.')?;
    layer(family).find(|pair| pair.1 == part).map(|pair| format!("blk.{nth}.{}.{kind}", pair.0))
}

/// The other way round.
pub(super) fn theirs(ours: &str, family: &Family) -> Option<String> {
    let (stem, kind) = split(ours)?;
    let Some(in_layer) = stem.strip_prefix("blk.") else {
        return TOP.iter().find(|pair| pair.0 == stem).map(|pair| format!("{}.{kind}", pair.1));
    };
    let (nth, part) = in_layer.split_once('.')?;
    layer(family).find(|pair| pair.0 == part).map(|pair| format!("model.layers.{nth}.{}.{kind}", pair.1))
}

fn split(name: &str) -> Option<(&str, &str)> {
    name.rsplit_once('.').filter(|(_, kind)| matches!(*kind, "weight" | "bias"))
}

/// What files of older libraries carry along and nobody reads: the rotation's frequencies.
pub(super) fn is_leftover(theirs: &str) -> bool {
    theirs.ends_with(".rotary_emb.inv_freq")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::FAMILIES;

    #[test]
    fn names_go_there_and_back() {
        let check = |family: &str, hf: &str, expect: Option<&str>| {
            let family = Family::find(family).unwrap();
            let got = ours(hf, &family);
            assert_eq!(got.as_deref(), expect, "{hf}");
            if let Some(got) = got {
                assert_eq!(theirs(&got, &family).as_deref(), Some(hf));
            }
        };
        for family in FAMILIES {
            check(family.name, "model.embed_tokens.weight", Some("token_embd.weight"));
            check(family.name, "lm_head.weight", Some("output.weight"));
            check(family.name, "model.layers.12.self_attn.q_proj.bias", Some("blk.12.attn_q.bias"));
            check(family.name, "model.layers.0.mlp.experts.0.up_proj.weight", None);
            check(family.name, "model.layers.0.mlp.up_proj", None);
            check(family.name, "vision_tower.weight", None);
        }
        let norm = "model.layers.1.post_attention_layernorm.weight";
        check("llama", norm, Some("blk.1.ffn_norm.weight"));
        check("gemma3", norm, Some("blk.1.post_attention_norm.weight"));
        check("llama", "model.layers.1.pre_feedforward_layernorm.weight", None);
        check("gemma3", "model.layers.1.pre_feedforward_layernorm.weight", Some("blk.1.ffn_norm.weight"));
    }
}
