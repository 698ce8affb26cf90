//! Multitask prompt tuning (Wang et al. 2023): prompt tuning (`prompt.rs`) whose embeddings are a shared prompt times, element by
//! element, the product of a few columns and rows that each task has: `P * (cols[t] rows[t])`. PEFT names the task anew for each
//! text; here the config's key `task_id` does, 0 without it. The prompt is made when it is attached, and is not trained further.

use crate::adapter::forms::Prefix;
use crate::adapter::held::Loader;
use crate::adapter::method::{AdapterMethod, Settings};
use crate::adapter::peft::{KeyUse, Keys, Use};
use crate::adapter::prompt::{EMBEDDINGS, NUMBERS, Prompt, whole};
use crate::adapter::tensor::{Stored, TensorSpec};
use crate::error::{Error, Result};
use Use::{Honoured, NoEffect};
use pocketlora_kernels::Backend;
use pocketlora_models::{Model, Param};
use serde_json::{Value, json};

const COLUMNS: &str = "prefix_task_cols";
const ROWS: &str = "prefix_task_rows";

/// The keys of PEFT's configs of it (0.21), and which task is meant.
const KEYS: &[KeyUse] = &[
    NUMBERS[0],
    NUMBERS[1],
    ("num_ranks", Honoured, ""),
    ("num_tasks", Honoured, ""),
    NUMBERS[2],
    NUMBERS[3],
    ("prompt_tuning_init", Honoured, ""),
    ("prompt_tuning_init_state_dict_path", NoEffect, ""), // how it began, as the next two
    ("prompt_tuning_init_task", NoEffect, ""),
    ("prompt_tuning_init_text", NoEffect, ""),
    ("task_id", Honoured, ""),
    NUMBERS[4],
    ("tokenizer_kwargs", NoEffect, ""),       // how it began
    ("tokenizer_name_or_path", NoEffect, ""), // the same
];

/// Settings of multitask prompt tuning.
#[derive(Clone, Debug, PartialEq)]
pub struct MultitaskPromptTuning {
    /// Its virtual tokens.
    pub prompt: Prompt,
    /// As what they began, as PEFT names it.
    pub init: String,
    /// Columns and rows of a task (`num_ranks`).
    pub ranks: usize,
    /// Tasks in the file.
    pub tasks: usize,
    /// The one that is used (`task_id`).
    pub task: usize,
}

impl MultitaskPromptTuning {
    /// The prompt of the task.
    fn made(&self, embeddings: &[f32], columns: &[f32], rows: &[f32]) -> Vec<f32> {
        let Prompt { tokens, width, .. } = self.prompt;
        let columns = &columns[self.task * tokens * self.ranks..][..tokens * self.ranks];
        let rows = &rows[self.task * self.ranks * width..][..self.ranks * width];
        let value = |(i, p): (usize, &f32)| {
            let columns = &columns[i / width * self.ranks..][..self.ranks];
            let sum: f32 = columns.iter().enumerate().map(|(k, c)| c * rows[k * width + i % width]).sum();
            p * sum
        };
        embeddings.iter().enumerate().map(value).collect()
    }
}

impl AdapterMethod for MultitaskPromptTuning {
    const PEFT_TYPE: &'static str = "MULTITASK_PROMPT_TUNING";
    const NAME: &'static str = "multitask prompt tuning";
    const KEYS: &'static [KeyUse] = KEYS;
    const PARTS: &'static [&'static str] = &[];
    const SHARED: &'static [&'static str] = &[COLUMNS, ROWS, EMBEDDINGS];
    const SHARED_DIMENSIONS: Option<usize> = None;
    const STORED: Stored = Stored::F32;
    const ADDS_UP: bool = false;
    const SETTINGS: &'static [&'static str] = &["num-virtual-tokens"];

    fn read(keys: &Keys<'_>) -> Result<Self> {
        let init = keys.text("prompt_tuning_init")?.unwrap_or_else(|| "RANDOM".to_owned());
        let number = |key: &str| keys.get(key).map_or(Ok(1), |_| whole(keys, key));
        let (ranks, tasks) = (number("num_ranks")?, number("num_tasks")?);
        let task = keys.whole("task_id", 0, 0)?;
        if task >= tasks {
            return Err(keys.wrong("task_id", &format!("a task below `num_tasks`, which is {tasks}")));
        }
        Ok(Self { prompt: Prompt::read(keys)?, init, ranks, tasks, task })
    }

    fn begin(_settings: &Settings, _model: &dyn Model) -> Result<(Self, Vec<Param>)> {
        let expected = "`prompt-tuning`, which is trained here; several tasks at once are trained with PEFT";
        Err(Error::config("method", expected, "multitask-prompt-tuning"))
    }

    fn shapes(&self, _module: &str, _layer: [usize; 2]) -> Vec<Vec<usize>> {
        Vec::new()
    }

    fn shared(&self, model: &dyn Model) -> Result<Vec<TensorSpec>> {
        let Prompt { tokens, width, .. } = self.prompt;
        let spec = |(name, shape): (&str, Vec<usize>)| TensorSpec { name: name.to_owned(), shape };
        let of_tasks = [(COLUMNS, vec![self.tasks, tokens, self.ranks]), (ROWS, vec![self.tasks, self.ranks, width])];
        Ok(of_tasks.into_iter().map(spec).chain(self.prompt.shared(model)?).collect())
    }

    fn start(&self, spec: &TensorSpec, _part: usize, _module: usize, _seed: u64) -> Vec<f32> {
        vec![0.0; spec.values()]
    }

    fn in_attention<B: Backend>(&self, load: &mut Loader<'_, B>) -> Result<Option<Prefix>> {
        let Prompt { tokens, width, .. } = self.prompt;
        let own = [EMBEDDINGS, COLUMNS, ROWS].map(|name| load.host(name));
        let values = match own {
            [Some(embeddings), Some(columns), Some(rows)] => Some(self.made(embeddings, columns, rows)),
            _ => None,
        };
        let values = load.made(&[tokens, width], true, values.as_deref())?;
        Ok(Some(Prefix::of_embeddings(tokens, values)))
    }

    fn is_final(&self) -> Option<&'static str> {
        Some("prompts of several tasks are trained with PEFT alone")
    }

    fn settings(&self, settings: Settings) -> Settings {
        Settings { num_virtual_tokens: self.prompt.tokens, ..settings }
    }

    fn write(&self) -> Value {
        let mut config = self.prompt.write();
        let own = json!({
            "num_ranks": self.ranks, "num_tasks": self.tasks, "prompt_tuning_init": self.init,
            "prompt_tuning_init_state_dict_path": null, "prompt_tuning_init_task": 0, "prompt_tuning_init_text": null,
            "tokenizer_kwargs": null, "tokenizer_name_or_path": null,
        });
        for (key, value) in own.as_object().into_iter().flatten() {
            config[key] = value.clone();
        }
        // PEFT knows no such key.
        if self.task > 0 {
            config["task_id"] = self.task.into();
        }
        config
    }

    fn describe(&self) -> (String, Value) {
        let (tokens, tasks, task) = (self.prompt.tokens, self.tasks, self.task);
        let text = format!("{} with {tokens} virtual tokens, task {task} of {tasks} (`task_id`)", Self::NAME);
        (text, json!({"num_virtual_tokens": tokens, "num_tasks": tasks, "task_id": task}))
    }
}
