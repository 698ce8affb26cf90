//! What a chat does on a command.

use super::{COMMANDS, Chat, SETTINGS, file};
use crate::chat::Message;
use crate::cli::args::{SamplingArgs, described, warn};
use crate::cli::chat::input::Input;
use crate::cli::names;
use crate::error::{Error, ErrorCode, Result};
use std::path::{Path, PathBuf};

impl Chat {
    /// Obeys the command `line`, without its slash.
    pub(super) fn command(&mut self, line: &str, input: &mut Input) -> Result<()> {
        let (name, rest) = line.split_once(char::is_whitespace).unwrap_or((line, ""));
        match (name, rest.trim()) {
            ("help", _) => help(),
            ("reset", _) => {
                eprintln!("(forgot {} turns)", self.turns());
                self.forget();
            }
            ("regenerate", _) => self.again(None)?,
            ("edit", text) => self.edit(text, input)?,
            ("system", text) => self.set_system(text)?,
            ("think", text) => self.think(text)?,
            ("tool", "") => return Err(Error::config("/tool", "what the tool gave", "nothing")),
            ("tool", text) => self.say(Message::new("tool", text))?,
            ("stats", "" | "on" | "off") => {
                self.stats = if rest.trim().is_empty() { !self.stats } else { rest.trim() == "on" };
                eprintln!("(speed and memory after each answer: {})", if self.stats { "on" } else { "off" });
            }
            ("sampling" | "set", "") => self.show_settings(),
            ("set", setting) => self.set(setting)?,
            ("route", _) => self.show_route()?,
            ("adapter", "") => {
                let attached = self.engine.attached();
                if attached.is_empty() {
                    eprintln!("(no adapter is attached)");
                }
                attached.iter().for_each(|adapter| println!("{}={}", adapter.dir.display(), adapter.scale));
            }
            ("adapter", "none") => {
                self.engine.detach_all();
                eprintln!("(no adapter is attached)");
            }
            ("adapter", which) => {
                let (dir, scale) = names::scaled_adapter(which)?;
                if let Some(there) = self.engine.attached().iter().find(|there| there.dir == dir) {
                    self.engine.set_scales(&[(there.id, scale)])?;
                    eprintln!("({}={scale} from the next answer on)", dir.display());
                } else {
                    self.engine.attach(&dir, scale)?;
                    self.engine.attached().last().into_iter().for_each(warn);
                    eprintln!("(attached {})", dir.display());
                }
            }
            ("save", file) => self.save(&file_of("/save", file)?)?,
            ("load", file) => self.load(&file_of("/load", file)?)?,
            (other, _) => {
                let message =
                    "there is no such command; `/help` lists them, and a space before the slash makes it a question";
                return Err(Error::new(ErrorCode::Config, format!("`/{other}`"), message));
            }
        }
        Ok(())
    }

    fn show_route(&self) -> Result<()> {
        if self.engine.routed().is_empty() {
            return Err(Error::config(
                "/route",
                "adapters to pick from, as `chat --adapters DIR --route` has them",
                "none",
            ));
        }
        for pick in self.inner.picked() {
            // Of a chat that goes on from a file only the weights are known until it is asked.
            let near = if pick.similarity.is_nan() { "unknown".to_owned() } else { format!("{:.2}", pick.similarity) };
            println!("{}: similarity {near}, weight {}", pick.name, pick.weight);
        }
        if self.inner.picked().is_empty() {
            eprintln!("(nothing is asked yet)");
        }
        Ok(())
    }

    fn show_settings(&self) {
        println!("{}", described(&self.inner.sampling));
    }

    /// Asks the last question once more, or `question` in its place. What was said stays if no answer comes.
    fn again(&mut self, question: Option<&str>) -> Result<()> {
        let old = self.inner.messages().to_vec();
        let last = self.last_question()?;
        let question = Message::new("user", question.unwrap_or(old[last].content.as_deref().unwrap_or_default()));
        self.inner.set_messages(old[..last].to_vec());
        let done = self.say(question);
        if self.inner.messages().len() <= last {
            self.inner.set_messages(old);
        }
        done
    }

    /// Place of the last question.
    fn last_question(&self) -> Result<usize> {
        let last = self.inner.messages().iter().rposition(|message| message.role == "user");
        last.ok_or_else(|| {
            Error::new(ErrorCode::Data, "chat", "expected a question before this, got none yet; ask something first")
        })
    }

    fn edit(&mut self, text: &str, input: &mut Input) -> Result<()> {
        let last = self.last_question()?;
        if !text.is_empty() {
            return self.again(Some(text));
        }
        if input.is_piped() {
            return Err(Error::config("/edit", "the question in its new words", "nothing"));
        }
        let old = self.inner.messages()[last].content.clone().unwrap_or_default();
        match input.edited(&old)? {
            Some(new) => self.again(Some(new.trim())),
            None => {
                eprintln!("(nothing is changed)");
                Ok(())
            }
        }
    }

    fn set_system(&mut self, text: &str) -> Result<()> {
        match text {
            "" => println!("{}", self.system.as_deref().unwrap_or("(no system prompt)")),
            text => {
                let system = (text != "none").then(|| text.to_owned());
                if system.is_some() {
                    self.engine.text()?.template.check_system()?;
                }
                let said: Vec<Message> = self.inner.messages().iter().skip(self.system.iter().len()).cloned().collect();
                let first = system.iter().map(|text| Message::new("system", text));
                self.inner.set_messages(first.chain(said).collect());
                self.system = system;
                eprintln!("(the system prompt is in force from the next answer on)");
            }
        }
        Ok(())
    }

    fn think(&mut self, text: &str) -> Result<()> {
        let wanted = match text {
            "" => {
                println!(
                    "{}",
                    match self.inner.thinking {
                        None => "auto",
                        Some(true) => "on",
                        Some(false) => "off",
                    }
                );
                return Ok(());
            }
            "on" => Some(true),
            "off" => Some(false),
            "auto" => None,
            other => return Err(Error::config("/think", "`on`, `off` or `auto`", other)),
        };
        if wanted.is_some() && !self.engine.text()?.template.knows_thinking() {
            let message = "the model's chat template knows no thinking, and answers come as they are; take a model that \
                           was taught to think";
            return Err(Error::new(ErrorCode::Unsupported, "/think", message));
        }
        self.inner.thinking = wanted;
        eprintln!("(thinking: {text})");
        Ok(())
    }

    /// `NAME VALUE`, or `NAME=VALUE`.
    fn set(&mut self, setting: &str) -> Result<()> {
        let (name, value) = setting.split_once([' ', '=']).unwrap_or((setting, ""));
        let (name, value) = (name.replace('_', "-"), value.trim());
        if name == "max-tokens" {
            let tokens = value.parse().ok().filter(|n| *n > 0);
            self.inner.max_tokens =
                tokens.ok_or_else(|| Error::config("max-tokens", "a whole number from 1", value))?;
        } else {
            let args = SamplingArgs::one(&name, value).unwrap_or_else(|| {
                let expected = format!("one of {}", SETTINGS.join(", "));
                Err(Error::config("/set", expected, &name))
            })?;
            let now = self.inner.sampling.clone();
            self.inner.sampling = args.over(now.clone(), now.seed)?;
        }
        eprintln!("({name} {value})");
        Ok(())
    }

    fn save(&self, path: &Path) -> Result<()> {
        if self.turns() == 0 {
            let message = "expected a question and its answer, got none yet; ask something first";
            return Err(Error::new(ErrorCode::Data, "/save", message));
        }
        let cut = match file::append(path, self.inner.messages())? {
            0 => String::new(),
            n => format!("; {n} of them, cut before their end, are marked so and are not learned"),
        };
        eprintln!("(saved {} turns to {}{cut})", self.turns(), path.display());
        Ok(())
    }

    fn load(&mut self, path: &Path) -> Result<()> {
        let messages = file::last(path)?;
        // What the template refuses is refused now, and the conversation stays.
        self.engine.text()?.template.render(&messages, None, false)?;
        self.take(messages);
        eprintln!("(loaded {} turns from {})", self.turns(), path.display());
        Ok(())
    }
}

fn file_of(command: &str, file: &str) -> Result<PathBuf> {
    match file {
        "" => Err(Error::config(command, "a file name", "nothing")),
        file => Ok(names::expanded(Path::new(file))),
    }
}

fn help() {
    let width = COMMANDS.iter().map(|(name, takes, _)| name.len() + takes.len() + 1).max().unwrap_or(0);
    for (name, takes, what) in COMMANDS {
        println!("{:<width$}  {what}", format!("{name} {takes}"));
    }
    println!(
        "Tab completes commands. A text of several lines stands between lines of \"\"\". Ctrl-C stops an answer, also while\n\
         a long text is read. A question that begins with a slash needs a space before it."
    );
}
