//! Chat templates: a conversation rendered as the model was taught to read it.

mod answers;
mod files;
mod json;
mod markers;
mod message;
mod plain;
mod probe;

pub use answers::Rendering;
pub use message::{CUT, Message};
pub use plain::Rendered;

use crate::error::{Error, ErrorCode, Result};
use crate::tokenizer::{SpecialText, Tokenizer};
use files::{DEFAULT, TOOL_USE};
use markers::Marks;
use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Serde, merge_maps};
use minijinja::{Environment, ErrorKind};
use plain::Marker;
use serde::Serialize;
use serde_json::Value;
use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

/// For a model without a template that has ChatML's tokens.
const CHATML: &str = "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n\
                      {% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";
/// For one that has not: the layout of the Stanford Alpaca data, which models without a template are usually taught with.
/// An answer ends with the model's own end of a text, so that generation stops there.
const ALPACA: &str = "{{ bos_token }}{% if not messages or messages[0].role != 'system' %}Below is an instruction that \
                      describes a task. Write a response that appropriately completes the request.\n\n{% endif %}\
                      {% for m in messages %}{% if m.role == 'assistant' %}### Response:\n{{ m.content }}{{ eos_token \
                      }}\n\n{% elif m.role == 'system' %}{{ m.content }}\n\n{% else %}### Instruction:\n{{ m.content \
                      }}\n\n{% endif %}{% endfor %}{% if add_generation_prompt %}### Response:\n{% endif %}";

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
    /// There are none, which templates may ask.
    documents: Option<&'a Value>,
    add_generation_prompt: bool,
    /// Whether to think first, under the two names that templates have for it; absent where nobody says.
    #[serde(skip_serializing_if = "Option::is_none")]
    enable_thinking: Option<bool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    thinking: Option<bool>,
    #[serde(flatten)]
    special: BTreeMap<&'a str, &'a str>,
}

/// A model's chat template (Jinja2, as Hugging Face renders it), or several by name: `tool_use` counts where tools are
/// given, `default` elsewhere.
pub struct ChatTemplate {
    env: Environment<'static>,
    special: Vec<(String, String)>,
    place: String,
    /// It is the model's own, not the one for models without.
    own: bool,
    /// Those with `{% generation %}` blocks.
    marked: Vec<String>,
    /// For the special tokens in messages, unless they are to be parsed.
    marker: Option<Marker>,
}

impl ChatTemplate {
    /// The templates in `dir` by their names, if there are any.
    ///
    /// # Errors
    /// A file is broken.
    pub(crate) fn find(dir: &Path) -> Result<Option<Vec<(String, String)>>> {
        Ok(files::find(dir)?.map(|(named, _)| named))
    }

    /// Finds the template in `chat_template.jinja` and the folder `additional_chat_templates`, `chat_template.json` or
    /// `tokenizer_config.json`. A model without one gets ChatML if it has ChatML's tokens, else the layout of the Alpaca
    /// data. The token with which the template ends an answer is added to those at which `tokenizer` has answers stop.
    ///
    /// # Errors
    /// A file is broken or a template does not parse.
    pub fn open(dir: &Path, tokenizer: &mut Tokenizer) -> Result<Self> {
        let found = files::find(dir)?;
        let own = found.is_some();
        let mut special = tokenizer.special.clone();
        let (templates, path) = found.unwrap_or_else(|| {
            // What the tokenizer puts before a text stands before a chat, too, and nothing else does.
            special.retain(|(name, _)| name != "bos_token");
            let prefix = tokenizer.decode_with_special(tokenizer.prefix_ids()).unwrap_or_default();
            special.push(("bos_token".to_owned(), prefix));
            let chatml = ["<|im_start|>", "<|im_end|>"].iter().all(|t| tokenizer.id(t).is_some());
            let text = if chatml { CHATML } else { ALPACA };
            (vec![(DEFAULT.to_owned(), text.to_owned())], dir.join("tokenizer_config.json"))
        });
        let mut template = Self::with_names(templates.clone(), special, format!("`{}`", path.display()))?;
        template.own = own;
        template.marker = match tokenizer.special_text {
            SpecialText::Parse => None,
            SpecialText::Auto | SpecialText::Text => {
                let text: String = templates.into_iter().map(|(_, text)| text).collect();
                Some(Marker { assistant: tokenizer.specials(), others: tokenizer.specials_and_those_in(&text) })
            }
        };
        // Two short turns need little; a hostile template does not get all of it twice.
        template.env.set_fuel(Some(FUEL / 64));
        let end = template.turn_end(tokenizer);
        template.env.set_fuel(Some(FUEL));
        tokenizer.stop.extend(end.filter(|end| !tokenizer.stop.contains(end)));
        Ok(template)
    }

    /// Whether the model came with a template; one without may not know turns at all.
    #[must_use]
    pub fn is_own(&self) -> bool {
        self.own
    }

    /// What a model without a template of its own is asked in.
    #[cfg(feature = "cli")]
    pub(crate) fn stand_in(&self) -> &'static str {
        let chatml = self.env.get_template(DEFAULT).is_ok_and(|t| t.source() == CHATML);
        if chatml { "ChatML" } else { "the Alpaca data" }
    }

    /// A template given as text; `place` names it in errors.
    ///
    /// # Errors
    /// It does not parse or is absurdly long.
    pub fn new(text: String, special: Vec<(String, String)>, place: String) -> Result<Self> {
        Self::with_names(vec![(DEFAULT.to_owned(), text)], special, place)
    }

    fn with_names(templates: Vec<(String, String)>, special: Vec<(String, String)>, place: String) -> Result<Self> {
        let mut env = Environment::new();
        // transformers renders with these two; templates rely on them.
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        env.set_syntax(syntax.expect("the default delimiters are valid"));
        env.set_fuel(Some(FUEL));
        // Errors would hold the template's values, whose depth only the deep stack can drop.
        env.set_debug(false);
        env.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        env.add_function("raise_exception", |message: String| -> Result<String, minijinja::Error> {
            Err(minijinja::Error::new(ErrorKind::InvalidOperation, message))
        });
        env.add_function("strftime_now", |format: String| crate::clock::strftime_now(&format));
        env.add_filter("tojson", json::python_json);
        // Python's lays its text out in another way.
        env.remove_filter("pprint");
        env.set_formatter(|out, state, value| match json::python_float_of(value) {
            Some(text) => out.write_str(&text).map_err(minijinja::Error::from),
            None => minijinja::escape_formatter(out, state, value),
        });
        let mut marked = Vec::new();
        for (name, text) in templates {
            if text.len() > MAX_TEMPLATE {
                let message =
                    format!("chat template: expected at most {MAX_TEMPLATE} bytes, got `{}`; replace it", text.len());
                return Err(Error::new(ErrorCode::Format, place, message));
            }
            // Jinja2 reads every kind of line's end as one character.
            let (text, has_marks) = markers::replace(&text.replace("\r\n", "\n").replace('\r', "\n"));
            on_deep_stack(|| env.add_template_owned(name.clone(), text))?.map_err(|e| {
                let message = format!("chat template: expected valid Jinja, got {e}; replace it with a valid one");
                Error::new(ErrorCode::Format, &place, message).caused_by(e)
            })?;
            marked.extend(has_marks.then_some(name));
        }
        Ok(Self { env, special, place, own: true, marked, marker: None })
    }

    /// The special token that follows an answer, if one does.
    fn turn_end(&self, tokenizer: &Tokenizer) -> Option<u32> {
        const ANSWER: &str = "answer 42";
        let messages = [Message::new("user", "question"), Message::new("assistant", ANSWER)];
        let text = self.render(&messages, None, false).ok()?.text;
        let after = text[text.rfind(ANSWER)? + ANSWER.len()..].trim_start();
        let end = tokenizer.special_in(after).into_iter().next().filter(|range| range.start == 0)?;
        tokenizer.id(&after[end])
    }

    /// The template for a conversation with these tools.
    fn name(&self, tools: Option<&Value>) -> Result<&'static str> {
        let has = |name| self.env.get_template(name).is_ok();
        if tools.is_some() && has(TOOL_USE) {
            return Ok(TOOL_USE);
        }
        if has(DEFAULT) {
            return Ok(DEFAULT);
        }
        let names: Vec<&str> = self.env.templates().map(|(name, _)| name).collect();
        let message = format!(
            "chat template: expected one named `{DEFAULT}`, got only `{}`; name one of them `{DEFAULT}`",
            names.join("`, `")
        );
        Err(Error::new(ErrorCode::Format, &self.place, message))
    }

    /// The conversation as text, with the header of the next assistant turn if `add_generation_prompt`.
    ///
    /// # Errors
    /// The template refuses these messages (order of roles, unknown role, ...), or does not come to an end.
    pub fn render(&self, messages: &[Message], tools: Option<&Value>, add_generation_prompt: bool) -> Result<Rendered> {
        self.render_thinking(messages, tools, add_generation_prompt, None)
    }

    /// As [`ChatTemplate::render`], for a model that is to think before it answers, or is not to, where `thinking` says so
    /// and the template knows of it ([`ChatTemplate::knows_thinking`]).
    ///
    /// # Errors
    /// As there.
    pub fn render_thinking(
        &self,
        messages: &[Message],
        tools: Option<&Value>,
        add_generation_prompt: bool,
        thinking: Option<bool>,
    ) -> Result<Rendered> {
        let text = self.with_marks(messages, tools, |messages, tools| {
            on_deep_stack(|| self.render_marked(messages, tools, add_generation_prompt, thinking))?
                .map(|(text, _)| text)
        })?;
        Ok(plain::unmark(&text, &mut []))
    }

    /// Whether the template asks if the model is to think first: by `enable_thinking`, as most do, or by `thinking`.
    #[must_use]
    pub fn knows_thinking(&self) -> bool {
        let names = || {
            let mut asked = self.env.templates().flat_map(|(_, template)| template.undeclared_variables(false));
            asked.any(|name| matches!(name.as_str(), "enable_thinking" | "thinking"))
        };
        on_deep_stack(names).unwrap_or(false)
    }

    /// Runs `work` on the messages and tools, in which special tokens have marks if they are not to be parsed.
    fn with_marks<T>(
        &self,
        messages: &[Message],
        tools: Option<&Value>,
        work: impl FnOnce(&[Message], Option<&Value>) -> Result<T>,
    ) -> Result<T> {
        match self.marker.as_ref().and_then(|m| m.mark(messages, tools)) {
            None => work(messages, tools),
            Some((messages, tools)) => work(&messages, tools.as_ref()),
        }
    }

    fn render_here(&self, messages: &[Message], tools: Option<&Value>, add_generation_prompt: bool) -> Result<String> {
        Ok(self.render_marked(messages, tools, add_generation_prompt, None)?.0)
    }

    /// The text, and the bytes of it within `{% generation %}` blocks.
    fn render_marked(
        &self,
        messages: &[Message],
        tools: Option<&Value>,
        add_generation_prompt: bool,
        thinking: Option<bool>,
    ) -> Result<(String, Vec<Range<usize>>)> {
        let template = self.env.get_template(self.name(tools)?).expect("`name` found it");
        let context = RenderContext {
            messages,
            tools,
            documents: None,
            add_generation_prompt,
            enable_thinking: thinking,
            thinking,
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
        assert_eq!(chat.render(&messages, None, false).unwrap().text, "q>a");
    }

    #[test]
    fn a_template_may_refuse() {
        let chat = template("{{ raise_exception('roles must alternate') }}");
        let error = chat.render(&[], None, false).unwrap_err();
        assert!(error.to_string().contains("roles must alternate"), "{error}");
    }
}
