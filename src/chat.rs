//! Chat templates: a conversation rendered as the model was taught to read it.

use crate::error::{Error, ErrorCode, Result};
use crate::tokenizer::{Tokenizer, read_json};
use minijinja::syntax::SyntaxConfig;
use minijinja::value::Serde;
use minijinja::{Environment, ErrorKind};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;

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

/// One turn. Keys that only some templates know (tool calls, names) are passed through.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Message {
    /// `system`, `user`, `assistant`, `tool`.
    pub role: String,
    /// Its text; absent where a turn only calls tools.
    #[serde(default)]
    pub content: Option<String>,
    /// Anything else.
    #[serde(flatten)]
    pub extra: Map<String, Value>,
}

impl Message {
    /// A turn of plain text.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Self {
        Self { role: role.into(), content: Some(content.into()), extra: Map::new() }
    }
}

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
        Self::new(text.unwrap_or_else(|| CHATML.to_owned()), tokenizer.special.clone(), format!("`{}`", path.display()))
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
        // The markers around generated text do not change what is rendered; masks come from rendering differences.
        let text = strip_generation_markers(&text);
        on_deep_stack(|| env.add_template_owned("chat", text))?.map_err(|e| {
            let message = format!("chat template: expected valid Jinja, got {e}; replace it with a valid one");
            Error::new(ErrorCode::Format, &place, message).caused_by(e)
        })?;
        Ok(Self { env, special, place })
    }

    /// The conversation as text, with the header of the next assistant turn if `add_generation_prompt`.
    ///
    /// # Errors
    /// The template refuses these messages (order of roles, unknown role, ...), or does not come to an end.
    pub fn render(&self, messages: &[Message], tools: Option<&Value>, add_generation_prompt: bool) -> Result<String> {
        on_deep_stack(|| self.render_here(messages, tools, add_generation_prompt))?
    }

    fn render_here(&self, messages: &[Message], tools: Option<&Value>, add_generation_prompt: bool) -> Result<String> {
        let template = self.env.get_template("chat").expect("added by `new`");
        let context = RenderContext {
            messages,
            tools,
            add_generation_prompt,
            special: self.special.iter().map(|(name, text)| (name.as_str(), text.as_str())).collect(),
        };
        let failed = |reason: &str| {
            let message = format!("chat template: {reason}; change the messages, or the template if they are in order");
            Error::new(ErrorCode::Data, &self.place, message)
        };
        let text = template.render(minijinja::Value::from(Serde(context))).map_err(|e| {
            let reason = e.detail().map_or_else(|| e.to_string(), str::to_owned);
            failed(&reason).caused_by(e)
        })?;
        if text.len() > MAX_TEXT {
            return Err(failed(&format!("expected at most {MAX_TEXT} bytes of text, got `{}`", text.len())));
        }
        Ok(text)
    }

    /// The conversation as text with the byte ranges that the assistant would write, found by what each assistant
    /// turn adds to the rendering of all before it.
    ///
    /// # Errors
    /// As [`ChatTemplate::render`]; also where the template rewrites earlier text when a turn is added.
    pub fn render_with_answers(
        &self,
        messages: &[Message],
        tools: Option<&Value>,
    ) -> Result<(String, Vec<Range<usize>>)> {
        on_deep_stack(|| self.render_with_answers_here(messages, tools))?
    }

    fn render_with_answers_here(
        &self,
        messages: &[Message],
        tools: Option<&Value>,
    ) -> Result<(String, Vec<Range<usize>>)> {
        let text = self.render_here(messages, tools, false)?;
        let mut answers = Vec::new();
        for (i, _) in messages.iter().enumerate().filter(|(_, m)| m.role == "assistant") {
            let before = self.render_here(&messages[..i], tools, true)?;
            let after = self.render_here(&messages[..=i], tools, false)?;
            // Some templates end a conversation differently from how they continue it; what both share is the turn.
            let shared = common_prefix(&after, &text);
            if !text.starts_with(&before) || shared <= before.len() {
                let message = format!(
                    "chat template: expected turn {i} to extend the text before it, got other text, so the answer's \
                     place is unknown; use a template that leaves earlier turns alone"
                );
                return Err(Error::new(ErrorCode::Data, &self.place, message));
            }
            answers.push(before.len()..shared);
        }
        Ok((text, answers))
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

fn common_prefix(a: &str, b: &str) -> usize {
    let mut n = a.bytes().zip(b.bytes()).take_while(|(x, y)| x == y).count();
    while !b.is_char_boundary(n) {
        n -= 1;
    }
    n
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

/// Removes `{% generation %}` and `{% endgeneration %}`, which mark answers for trainers and print nothing.
fn strip_generation_markers(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(start) = rest.find("{%") {
        let Some(len) = rest[start..].find("%}") else { break };
        let tag = rest[start + 2..start + len].trim_matches(|c: char| c == '-' || c == '+' || c.is_whitespace());
        let end = start + len + 2;
        if matches!(tag, "generation" | "endgeneration") {
            out.push_str(&rest[..start]);
        } else {
            out.push_str(&rest[..end]);
        }
        rest = &rest[end..];
    }
    out.push_str(rest);
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn template(text: &str) -> ChatTemplate {
        ChatTemplate::new(text.to_owned(), vec![("eos_token".into(), "</s>".into())], "test".into()).unwrap()
    }

    #[test]
    fn answers_are_found_by_what_a_turn_adds() {
        let chat = template(CHATML);
        let messages = ["user", "assistant", "user", "assistant"].map(|r| Message::new(r, format!("I am the {r}")));
        let (text, answers) = chat.render_with_answers(&messages, None).unwrap();
        let found: Vec<&str> = answers.iter().map(|r| &text[r.clone()]).collect();
        assert_eq!(found, ["I am the assistant<|im_end|>\n"; 2]);
    }

    #[test]
    fn an_answer_that_repeats_the_question_is_still_found() {
        let chat = template(
            "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}",
        );
        let messages = [Message::new("user", "echo"), Message::new("assistant", "echo")];
        let (text, answers) = chat.render_with_answers(&messages, None).unwrap();
        assert_eq!(text, "user: echo</s>assistant: echo</s>");
        assert_eq!((answers.len(), answers[0].clone()), (1, 25..text.len()));
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
