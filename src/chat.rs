//! Chat templates: a conversation rendered as the model was taught to read it.

mod answers;
mod json;
mod markers;
mod message;

pub use answers::Rendering;
pub use message::Message;

use crate::error::{Error, ErrorCode, Result};
use crate::tokenizer::{Tokenizer, read_json};
use markers::Marks;
use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Serde, merge_maps};
use minijinja::{Environment, ErrorKind};
use serde::Serialize;
use serde_json::{Map, Value};
use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

/// Used where a model has no template of its own.
const CHATML: &str = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}\
                      {% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";

/// Longest template, in bytes; the longest of published models have some 30 thousand.
const MAX_TEMPLATE: usize = 1 << 17;
/// Longest rendered conversation, in bytes: two million tokens or so. A template may print more than it was given.
const MAX_TEXT: usize = 1 << 23;
/// Work of one rendering in minijinja's units, an instruction or 64 bytes of data each, which bounds a hostile template
/// to seconds and some hundred megabytes. A chat of a thousand turns takes a tenth of it.
const FUEL: u64 = 4_000_000;
/// Bytes of stack, untouched unless used: what a template may nest within its length and fuel is parsed and dropped by
/// recursion.
const STACK: usize = 1 << 28;

/// What a template sees.
#[derive(Serialize)]
struct RenderContext<'a> {
    messages: &'a [Message],
    tools: Option<&'a Value>,
    add_generation_prompt: bool,
    #[serde(flatten)]
    special: BTreeMap<&'a str, &'a str>,
}

/// A model's chat template (Jinja2, as Hugging Face renders it).
pub struct ChatTemplate {
    env: Environment<'static>,
    special: Vec<(String, String)>,
    place: String,
    /// It is the model's own, not the one for models without.
    own: bool,
    /// It has `{% generation %}` blocks.
    marked: bool,
}

impl ChatTemplate {
    /// Finds the template in `chat_template.jinja` or `tokenizer_config.json`; a model without one gets ChatML.
    ///
    /// # Errors
    /// A file is broken or the template does not parse.
    pub fn open(dir: &Path, tokenizer: &Tokenizer) -> Result<Self> {
        let file = dir.join("chat_template.jinja");
        let (text, path) = match std::fs::read_to_string(&file) {
            Ok(text) => (Some(text), file),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
                let path = dir.join("tokenizer_config.json");
                (template_of(&read_json(&path)?, &path)?, path)
            }
            Err(e) => return Err(Error::io("read", &file, e)),
        };
        let (own, place) = (text.is_some(), format!("`{}`", path.display()));
        let template = Self::new(text.unwrap_or_else(|| CHATML.to_owned()), tokenizer.special.clone(), place)?;
        Ok(Self { own, ..template })
    }

    /// Whether the model came with a template; one without may not know turns at all.
    #[must_use]
    pub fn is_own(&self) -> bool {
        self.own
    }

    /// A template given as text; `place` names it in errors.
    ///
    /// # Errors
    /// It does not parse or is absurdly long.
    pub fn new(text: String, special: Vec<(String, String)>, place: String) -> Result<Self> {
        if text.len() > MAX_TEMPLATE {
            let message =
                format!("chat template: expected at most {MAX_TEMPLATE} bytes, got `{}`; replace it", text.len());
            return Err(Error::new(ErrorCode::Format, place, message));
        }
        let mut env = Environment::new();
        // transformers renders with these two; templates rely on them.
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        env.set_syntax(syntax.expect("the default delimiters are valid"));
        env.set_fuel(Some(FUEL));
        env.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        env.add_function("raise_exception", |message: String| -> Result<String, minijinja::Error> {
            Err(minijinja::Error::new(ErrorKind::InvalidOperation, message))
        });
        env.add_function("strftime_now", |format: String| crate::clock::strftime_now(&format));
        env.add_filter("tojson", json::python_json);
        let (text, marked) = markers::replace(&text);
        on_deep_stack(|| env.add_template_owned("chat", text))?.map_err(|e| {
            let message = format!("chat template: expected valid Jinja, got {e}; replace it with a valid one");
            Error::new(ErrorCode::Format, &place, message).caused_by(e)
        })?;
        Ok(Self { env, special, place, own: true, marked })
    }

    /// The conversation as text, with the header of the next assistant turn if `add_generation_prompt`.
    ///
    /// # Errors
    /// The template refuses these messages (order of roles, unknown role, ...), or does not come to an end.
    pub fn render(&self, messages: &[Message], tools: Option<&Value>, add_generation_prompt: bool) -> Result<String> {
        on_deep_stack(|| self.render_here(messages, tools, add_generation_prompt))?
    }

    fn render_here(&self, messages: &[Message], tools: Option<&Value>, add_generation_prompt: bool) -> Result<String> {
        Ok(self.render_marked(messages, tools, add_generation_prompt)?.0)
    }

    /// The text, and the bytes of it within `{% generation %}` blocks.
    fn render_marked(
        &self,
        messages: &[Message],
        tools: Option<&Value>,
        add_generation_prompt: bool,
    ) -> Result<(String, Vec<Range<usize>>)> {
        let template = self.env.get_template("chat").expect("added by `new`");
        let context = RenderContext {
            messages,
            tools,
            add_generation_prompt,
            special: self.special.iter().map(|(name, text)| (name.as_str(), text.as_str())).collect(),
        };
        let marks = Arc::new(Marks::default());
        let mut bytes = Vec::new();
        let context = merge_maps([marks.context(), minijinja::Value::from(Serde(context))]);
        template.render_captured_to(context, marks.counted(&mut bytes)).map_err(|e| {
            let reason = e.detail().map_or_else(|| e.to_string(), str::to_owned);
            self.refused(&reason).caused_by(e)
        })?;
        if bytes.len() > MAX_TEXT {
            return Err(self.refused(&format!("expected at most {MAX_TEXT} bytes of text, got `{}`", bytes.len())));
        }
        let text = String::from_utf8(bytes).expect("templates print text");
        Ok((text, marks.spans()))
    }

    fn refused(&self, reason: &str) -> Error {
        let message = format!("chat template: {reason}; change the messages, or the template if they are in order");
        Error::new(ErrorCode::Data, &self.place, message)
    }
}

/// Runs `work` on a thread whose stack is deep enough for what a template can nest.
fn on_deep_stack<T: Send>(work: impl FnOnce() -> T + Send) -> Result<T> {
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().name("chat template".into()).stack_size(STACK);
        let running = thread.spawn_scoped(scope, work).map_err(|e| {
            Error::new(ErrorCode::OutOfMemory, "chat template", "the system gave no thread for it").caused_by(e)
        })?;
        Ok(running.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
    })
}

/// `chat_template` is a string, or a list of named ones of which `default` counts.
fn template_of(config: &Map<String, Value>, path: &Path) -> Result<Option<String>> {
    let text = match config.get("chat_template") {
        None | Some(Value::Null) => return Ok(None),
        Some(Value::Array(list)) => {
            let default = list.iter().find(|t| t.get("name").and_then(Value::as_str) == Some("default"));
            default.or(list.first()).and_then(|t| t.get("template")?.as_str())
        }
        Some(other) => other.as_str(),
    };
    let unusable = || Error::format(path, "chat_template", "a string or a list of named ones", "something else");
    text.map(|t| Some(t.to_owned())).ok_or_else(unusable)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn template(text: &str) -> ChatTemplate {
        ChatTemplate::new(text.to_owned(), vec![("eos_token".into(), "</s>".into())], "test".into()).unwrap()
    }

    #[test]
    fn python_methods_and_generation_markers_work() {
        let chat = template(
            "{% for m in messages %}{% if m.role.startswith('a') %}{%- generation -%}{{ m.content.strip() }}\
             {%- endgeneration %}{% else %}{{ m['content'] | trim }}>{% endif %}{% endfor %}",
        );
        let messages = [Message::new("user", " q "), Message::new("assistant", " a ")];
        assert_eq!(chat.render(&messages, None, false).unwrap(), "q>a");
    }

    #[test]
    fn a_template_may_refuse() {
        let chat = template("{{ raise_exception('roles must alternate') }}");
        let error = chat.render(&[], None, false).unwrap_err();
        assert!(error.to_string().contains("roles must alternate"), "{error}");
    }
}
