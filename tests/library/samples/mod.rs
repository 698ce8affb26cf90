//! Promises about data: what is read from each form of file, what of it is learned, how it is split, and which samples
//! share a pass.

mod ends;
mod files;
mod forms;
mod keys;
mod masks;
mod packing;
mod property;
mod shipped;
mod splits;

use pocketlora::chat::ChatTemplate;
use pocketlora::tokenizer::Tokenizer;
use pocketlora::train::{Dataset, Sample, SampleLimits};
use serde_json::json;
use std::fs;
use std::path::{Path, PathBuf};

/// A file of tests/data/chat.
fn chat_file(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/chat").join(name)
}

/// A tokenizer of single bytes and every family's special tokens, with a chat template.
struct Reader {
    dir: tempfile::TempDir,
    tokenizer: Tokenizer,
    template: ChatTemplate,
}

impl Reader {
    /// With the family's template of tests/data/chat, changed by `change`, or with none.
    fn new(family: Option<&str>, bos: &str, eos: &str, change: &dyn Fn(String) -> String) -> Self {
        let dir = tempfile::tempdir().unwrap();
        fs::copy(chat_file("tokenizer.json"), dir.path().join("tokenizer.json")).unwrap();
        let mut config = json!({ "bos_token": bos, "eos_token": eos });
        if let Some(family) = family {
            let text = fs::read_to_string(chat_file(&format!("{family}.jinja"))).unwrap();
            config["chat_template"] = change(text.trim_end_matches('\n').to_owned()).into();
        }
        fs::write(dir.path().join("tokenizer_config.json"), config.to_string()).unwrap();
        let mut tokenizer = Tokenizer::open(dir.path()).unwrap();
        let template = ChatTemplate::open(dir.path(), &mut tokenizer).unwrap();
        Self { dir, tokenizer, template }
    }

    fn family(family: &str, bos: &str, eos: &str) -> Self {
        Self::new(Some(family), bos, eos, &unmarked)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn open(&self, path: &Path, seq: usize) -> pocketlora::Result<Dataset> {
        Dataset::open(path, &self.tokenizer, &self.template, SampleLimits { tokens: seq, vocab: 1000 })
    }

    /// Reads `bytes` as a file of that name.
    fn read(&self, name: &str, bytes: impl AsRef<[u8]>, seq: usize) -> pocketlora::Result<Dataset> {
        fs::write(self.path(name), bytes).unwrap();
        self.open(&self.path(name), seq)
    }

    /// Text of tokens, special ones included.
    fn text(&self, ids: &[u32]) -> String {
        let special = |id: u32| id >= 256;
        let parts = ids.chunk_by(|a, b| !special(*a) && !special(*b)).map(|part| match part {
            [id] if special(*id) => self.special(*id),
            bytes => self.tokenizer.decode(bytes).unwrap(),
        });
        parts.collect()
    }

    fn special(&self, id: u32) -> String {
        let json: serde_json::Value = serde_json::from_slice(&fs::read(chat_file("tokenizer.json")).unwrap()).unwrap();
        let token = json["added_tokens"].as_array().unwrap().iter().find(|t| t["id"] == id).unwrap();
        token["content"].as_str().unwrap().to_owned()
    }

    /// What is learned of a sample, run by run.
    fn learned(&self, sample: &Sample) -> Vec<String> {
        sample.trained.runs().iter().map(|r| self.text(&sample.ids[r.start as usize..r.end as usize])).collect()
    }
}

/// The tokenizer of single bytes as JSON, its special tokens in the vocabulary as well, so that others find room behind.
fn byte_tokenizer() -> serde_json::Value {
    let mut json: serde_json::Value = serde_json::from_slice(&fs::read(chat_file("tokenizer.json")).unwrap()).unwrap();
    for token in json["added_tokens"].as_array().unwrap().clone() {
        json["model"]["vocab"][token["content"].as_str().unwrap()] = token["id"].clone();
    }
    json
}

/// A line of data with a conversation.
fn line(turns: &[(&str, &str)]) -> String {
    let turns: Vec<serde_json::Value> =
        turns.iter().map(|(role, content)| json!({"role": role, "content": content})).collect();
    json!({ "messages": turns }).to_string()
}

/// The template without its `{% generation %}` blocks, but with the same white space.
fn unmarked(template: String) -> String {
    template.replace("endgeneration", "endif").replace(" generation", " if true")
}
