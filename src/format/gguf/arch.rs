//! What llama.cpp calls families, and in which order its files have the rows of query and key projections.

/// An architecture of llama.cpp.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Arch {
    /// `general.architecture`.
    pub name: &'static str,
    /// The families of Hugging Face that it stands for, by `model_type`.
    pub model_types: &'static [&'static str],
    /// Rows of each head of `attn_q` and `attn_k` lie in the order of interleaved RoPE, see [`super::interleaved_row`].
    pub interleaved: bool,
}

const fn arch(name: &'static str, model_types: &'static [&'static str], interleaved: bool) -> Arch {
    Arch { name, model_types, interleaved }
}

/// Architectures whose layers have the usual parts under the usual names.
const ARCHS: &[Arch] = &[
    arch("llama", &["llama", "mistral"], true),
    arch("arcee", &["arcee"], true),
    arch("granite", &["granite"], true),
    arch("smollm3", &["smollm3"], true),
    arch("qwen2", &["qwen2"], false),
    arch("qwen3", &["qwen3"], false),
    arch("gemma2", &["gemma2"], false),
    arch("gemma3", &["gemma3_text"], false),
    arch("olmo2", &["olmo2", "olmo3"], false),
];

impl Arch {
    /// The one called `name`.
    pub fn named(name: &str) -> Option<&'static Self> {
        ARCHS.iter().find(|arch| arch.name == name)
    }

    /// The one of the family `model_type`.
    pub fn of_model(model_type: &str) -> Option<&'static Self> {
        ARCHS.iter().find(|arch| arch.model_types.contains(&model_type))
    }

    /// Names of all, for messages.
    pub fn names() -> String {
        ARCHS.iter().map(|arch| arch.name).collect::<Vec<_>>().join("`, `")
    }
}
