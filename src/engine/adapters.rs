//! Adapters of an engine: attached and detached by id while chats work.
//!
//! An [`AdapterSet`] is what a chat works with: adapters in their order, built once and shared. A chat that works keeps
//! its set to the end of the answer, whatever is attached meanwhile.

use super::router::Router;
use super::{Engine, lock};
use crate::adapter::{AdapterFile, Adapters, mark};
use crate::base::Base;
use crate::error::{Error, ErrorCode, Result};
use crate::text::{Own, Text};
use crate::train::fingerprint;
use pocketlora_kernels::Cpu;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Weak};

/// Names an attached adapter. A number is used once in an engine's life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct AdapterId(pub(super) u64);

impl AdapterId {
    /// For other languages.
    #[must_use]
    pub fn number(self) -> u64 {
        self.0
    }
}

/// The largest factor on an adapter's effect: useful ones are around 1.
const MOST_SCALE: f32 = 1e4;

/// An attached adapter.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct Attached {
    /// Its name.
    pub id: AdapterId,
    /// Its folder; that of the run for a snapshot, and a mere name for one that was read from memory.
    pub dir: PathBuf,
    /// What its effect is multiplied by.
    pub scale: f32,
    /// What is odd about it, though nothing that stops it from working.
    pub warnings: Vec<String>,
}

/// Adapters that are used together, with the text that they ask for.
pub(crate) struct AdapterSet {
    pub(super) ids: Vec<AdapterId>,
    /// What the effect of each is multiplied by.
    pub(super) scales: Vec<f32>,
    pub adapters: Adapters<Cpu>,
    /// What an adapter brings, else the model's.
    pub text: Option<Arc<Text>>,
}

/// What an engine knows of its adapters.
pub(super) struct Registry {
    pub(super) last: u64,
    pub(super) entries: Vec<Entry>,
    pub(super) all: Arc<AdapterSet>,
    /// Adapters that are picked by request.
    pub(super) router: Option<Arc<Router>>,
    /// Other choices that chats have in use.
    chosen: Vec<Weak<AdapterSet>>,
}

#[derive(Clone)]
pub(super) struct Entry {
    pub(super) told: Attached,
    pub(super) values: Values,
    pub(super) own: Option<(Own, Arc<Text>)>,
}

/// Where an adapter's values are read again for another set.
#[derive(Clone)]
pub(super) enum Values {
    /// In its folder, with a hash of them.
    Folder(u64),
    /// Here: there may be no file.
    Memory(Arc<AdapterFile>),
}

impl Entry {
    /// Where it lies, if on a disk.
    pub(super) fn folder(&self) -> Option<PathBuf> {
        match &self.values {
            Values::Folder(_) => Some(self.told.dir.clone()),
            Values::Memory(file) => file.folder().map(Path::to_owned),
        }
    }

    fn file(&self) -> Result<Arc<AdapterFile>> {
        let hash = match &self.values {
            Values::Memory(file) => return Ok(Arc::clone(file)),
            Values::Folder(hash) => *hash,
        };
        let file = AdapterFile::open(&self.told.dir)?;
        if fingerprint(&file) != hash {
            let message =
                "expected the adapter that was attached, got another in its place; detach it and attach it again";
            return Err(Error::new(ErrorCode::AdapterMismatch, format!("`{}`", self.told.dir.display()), message));
        }
        Ok(Arc::new(file))
    }
}

impl Registry {
    pub fn new(base: &Base<Cpu>, text: Option<Arc<Text>>) -> Self {
        let none = AdapterSet { ids: Vec::new(), scales: Vec::new(), adapters: Adapters::none(base), text };
        Self { last: 0, entries: Vec::new(), all: Arc::new(none), router: None, chosen: Vec::new() }
    }
}

impl Engine {
    /// Adds the PEFT adapter in `dir`, its effect multiplied by `scale`; several add up, in their order. Weights that it
    /// brings in place of the base's, such as an embedding of more rows, are used with it.
    ///
    /// # Errors
    /// The adapter is broken, of an unsupported method, or for another base; it brings weights, and so does another, or
    /// the scale is not 1; the scale is beyond ten thousand, or no number. Nothing changes then.
    pub fn attach(&self, dir: &Path, scale: f32) -> Result<AdapterId> {
        let file = AdapterFile::open(dir)?;
        let hash = fingerprint(&file);
        self.attach_values(Arc::new(file), scale, |_| Values::Folder(hash))
    }

    /// Adds an adapter that is in memory already, such as the snapshot of a run, as [`Engine::attach`] does.
    ///
    /// # Errors
    /// As there.
    pub fn attach_file(&self, file: AdapterFile, scale: f32) -> Result<AdapterId> {
        self.attach_values(Arc::new(file), scale, Values::Memory)
    }

    fn attach_values(
        &self,
        file: Arc<AdapterFile>,
        scale: f32,
        values: impl FnOnce(Arc<AdapterFile>) -> Values,
    ) -> Result<AdapterId> {
        check_scale(scale)?;
        self.check_strictly(&file)?;
        let mut registry = lock(&self.0.adapters);
        if registry.router.is_some() {
            let message =
                "expected an engine whose adapters are not picked by request, got one that routes; detach all first";
            return Err(Error::new(ErrorCode::Config, format!("`{}`", file.dir.display()), message));
        }
        let mut warnings = self.doubts(&file)?;
        let own = self.own_text(&file, &registry.entries)?;
        if let Some((brought, _)) = &own
            && !registry.entries.is_empty()
            && registry.entries.iter().all(|entry| entry.own.is_none())
        {
            let (dir, names) = (file.dir.display(), brought.names());
            warnings
                .push(format!("`{dir}`: its {names} is used, and the other attached adapters were taught without it"));
        }
        let id = AdapterId(registry.last + 1);
        let told = Attached { id, dir: file.dir.clone(), scale, warnings };
        let entry = Entry { told, values: values(Arc::clone(&file)), own };
        let mut entries = registry.entries.clone();
        entries.push(entry);
        registry.all = self.build(&entries, Some(&file))?;
        (registry.last, registry.entries) = (id.0, entries);
        Ok(id)
    }

    /// Multiplies the effects of attached adapters by other numbers, those of `scales`, all at once. Nothing is read: a mix is
    /// swapped in well under a millisecond, and answers from the next question on are given with it.
    ///
    /// # Errors
    /// One is not attached, its scale is beyond ten thousand or no number, or what it does has no strength. Nothing changes then.
    pub fn set_scales(&self, scales: &[(AdapterId, f32)]) -> Result<()> {
        let mut registry = lock(&self.0.adapters);
        let mut entries = registry.entries.clone();
        for (id, scale) in scales {
            check_scale(*scale)?;
            let entry = entries.iter_mut().find(|entry| entry.told.id == *id).ok_or_else(|| not_attached(*id))?;
            entry.told.scale = *scale;
        }
        registry.all = self.again(&registry.all, &entries)?;
        registry.entries = entries;
        // They are what they are by their ids, and have other scales now.
        registry.chosen.clear();
        Ok(())
    }

    /// The set of `entries`, made of `there` where it holds them all, and read otherwise.
    fn again(&self, there: &AdapterSet, entries: &[Entry]) -> Result<Arc<AdapterSet>> {
        let place = |entry: &Entry| {
            let at = there.ids.iter().position(|id| *id == entry.told.id)?;
            Some((at, entry.told.scale))
        };
        let picks: Option<Vec<(usize, f32)>> = entries.iter().map(place).collect();
        match picks.map(|picks| there.adapters.mixed(&picks)).transpose()?.flatten() {
            Some(adapters) => Ok(Arc::new(self.set(entries, adapters))),
            None => self.build(entries, None),
        }
    }

    fn set(&self, entries: &[Entry], adapters: Adapters<Cpu>) -> AdapterSet {
        AdapterSet {
            ids: entries.iter().map(|entry| entry.told.id).collect(),
            scales: entries.iter().map(|entry| entry.told.scale).collect(),
            adapters,
            text: self.text_with(entries),
        }
    }

    /// The text that one of `entries` brings, else the model's.
    pub(super) fn text_with(&self, entries: &[Entry]) -> Option<Arc<Text>> {
        let own = entries.iter().find_map(|entry| entry.own.as_ref()).map(|(_, text)| Arc::clone(text));
        own.or_else(|| self.0.text.clone())
    }

    /// Removes an adapter. Answers that are being given end with it; a chat that chose it by its id is told at its next
    /// question.
    ///
    /// # Errors
    /// It is not attached; one of the others cannot be read again. Nothing changes then.
    pub fn detach(&self, id: AdapterId) -> Result<()> {
        let mut registry = lock(&self.0.adapters);
        let mut entries = registry.entries.clone();
        let at = entries.iter().position(|entry| entry.told.id == id).ok_or_else(|| not_attached(id))?;
        entries.remove(at);
        registry.all = self.again(&registry.all, &entries)?;
        registry.entries = entries;
        Ok(())
    }

    /// Removes all adapters, those of [`Engine::route`] among them.
    pub fn detach_all(&self) {
        let mut registry = lock(&self.0.adapters);
        let none = Registry::new(self.base(), self.0.text.clone());
        (registry.entries, registry.all, registry.router) = (Vec::new(), none.all, None);
    }

    /// The attached adapters, in their order.
    #[must_use]
    pub fn attached(&self) -> Vec<Attached> {
        lock(&self.0.adapters).entries.iter().map(|entry| entry.told.clone()).collect()
    }

    /// All attached adapters.
    pub(crate) fn all(&self) -> Arc<AdapterSet> {
        Arc::clone(&lock(&self.0.adapters).all)
    }

    /// No adapters: the model as it is.
    pub(crate) fn none(&self) -> Result<Arc<AdapterSet>> {
        self.set_of(Some(&[]))
    }

    /// The adapters `ids`, or all without.
    pub(super) fn set_of(&self, ids: Option<&[AdapterId]>) -> Result<Arc<AdapterSet>> {
        let mut registry = lock(&self.0.adapters);
        let Some(ids) = ids.filter(|ids| *ids != registry.all.ids) else { return Ok(Arc::clone(&registry.all)) };
        let entry = |id: &AdapterId| registry.entries.iter().find(|entry| entry.told.id == *id).cloned();
        let entries =
            ids.iter().map(|id| entry(id).ok_or_else(|| not_attached(*id))).collect::<Result<Vec<Entry>>>()?;
        registry.chosen.retain(|set| set.strong_count() > 0);
        if let Some(set) = registry.chosen.iter().filter_map(Weak::upgrade).find(|set| set.ids == ids) {
            return Ok(set);
        }
        let set = self.again(&registry.all, &entries)?;
        registry.chosen.push(Arc::downgrade(&set));
        Ok(set)
    }

    /// What tells the adapters of `set` from others, in their order: a hash of the values, and the factor on the effect.
    /// None where one was detached meanwhile.
    pub(super) fn identities(&self, set: &AdapterSet) -> Option<Vec<(u64, f32)>> {
        let registry = lock(&self.0.adapters);
        let identity = |(id, scale): (&AdapterId, &f32)| {
            let attached = registry.entries.iter().find(|entry| entry.told.id == *id);
            let entry = attached.or_else(|| registry.router.as_ref()?.entry(*id))?;
            let hash = match &entry.values {
                Values::Folder(hash) => *hash,
                Values::Memory(file) => fingerprint(file),
            };
            Some((hash, *scale))
        };
        set.ids.iter().zip(&set.scales).map(identity).collect()
    }

    /// Puts a set on the device. The values of the `last` may be here already.
    fn build(&self, entries: &[Entry], last: Option<&Arc<AdapterFile>>) -> Result<Arc<AdapterSet>> {
        let base = self.base();
        let mut adapters = Adapters::none(base);
        for (i, entry) in entries.iter().enumerate() {
            let file = match last.filter(|_| i + 1 == entries.len()) {
                Some(file) => Arc::clone(file),
                None => entry.file()?,
            };
            adapters.attach(base, &file, entry.told.scale, self.0.precision.adapters())?;
        }
        Ok(Arc::new(self.set(entries, adapters)))
    }

    /// The text that `file` brings, where texts are loaded. Attached adapters must not bring another.
    pub(super) fn own_text(&self, file: &AdapterFile, entries: &[Entry]) -> Result<Option<(Own, Arc<Text>)>> {
        if self.0.text.is_none() {
            return Ok(None);
        }
        let Some(own) = self.own(file)? else { return Ok(None) };
        entries.iter().filter_map(|entry| entry.own.as_ref()).try_for_each(|(there, _)| own.agree(there))?;
        let text = own.open(&self.0.dir, self.0.special_text)?;
        Ok(Some((own, Arc::new(text))))
    }

    /// What is odd about `file` on this base.
    pub(super) fn doubts(&self, file: &AdapterFile) -> Result<Vec<String>> {
        let mut doubts = file.doubts(self.base().model.as_ref())?;
        doubts.extend(self.name_doubt(file));
        doubts.extend(mark::doubt(self.base(), file)?);
        doubts.iter_mut().for_each(|doubt| *doubt = format!("`{}`: {doubt}", file.dir.display()));
        Ok(doubts)
    }

    /// That `file` names another base.
    fn name_doubt(&self, file: &AdapterFile) -> Option<String> {
        let named = file.base.as_deref().filter(|named| is_another(named, &self.0.base_name))?;
        Some(format!("it names `{named}` as its base, and this is `{}`", self.0.base_name))
    }

    /// Refuses an adapter that was trained on another model, as far as its file tells.
    ///
    /// # Errors
    /// It was.
    #[cfg(feature = "cli")]
    pub(crate) fn check_fits(&self, file: &AdapterFile) -> Result<()> {
        mark::check(self.base(), file)
    }

    /// Where [`Options::strict`](super::Options::strict) asks for it, refuses an adapter of another base: by the content
    /// hash that its file has, by the name of the base, or by its class. A file that tells none of these passes.
    ///
    /// # Errors
    /// It is of another base.
    pub(super) fn check_strictly(&self, file: &AdapterFile) -> Result<()> {
        if !self.0.strict {
            return Ok(());
        }
        let class = file.class_doubt(self.base().model.as_ref());
        match mark::doubt(self.base(), file)?.or_else(|| self.name_doubt(file)).or(class) {
            Some(doubt) => Err(of_another_base(file, &doubt)),
            None => Ok(()),
        }
    }
}

/// The error for `file` on a base that `doubt` tells from its own.
pub(crate) fn of_another_base(file: &AdapterFile, doubt: &str) -> Error {
    let message = format!(
        "expected the base that the adapter was trained on, got another: {doubt}; give that base with `-m`, or leave \
         `Options::strict` out to use the adapter all the same"
    );
    Error::new(ErrorCode::AdapterMismatch, format!("`{}`", file.dir.display()), message)
}

/// Refuses a factor beyond which nothing is left of what the model itself says, and numbers soon have no end.
fn check_scale(scale: f32) -> Result<()> {
    if (-MOST_SCALE..=MOST_SCALE).contains(&scale) {
        return Ok(());
    }
    Err(Error::config("scale", format!("a number from -{MOST_SCALE} to {MOST_SCALE}"), scale))
}

fn not_attached(id: AdapterId) -> Error {
    let message = "expected an attached adapter, got one that is not, or no more; attach it, or choose another";
    Error::new(ErrorCode::Config, format!("adapter {}", id.0), message)
}

/// Whether two names of the model hub are of different models, whatever form the weights are in. Paths tell nothing.
fn is_another(a: &str, b: &str) -> bool {
    let model = |name: &str| {
        let (owner, repository) = name.split_once('/')?;
        let path =
            owner.is_empty() || owner.starts_with(['.', '~']) || repository.contains('/') || Path::new(name).exists();
        let mut model = repository.to_ascii_lowercase();
        const FORMS: [&str; 6] = ["-bnb-4bit", "-unsloth", "-4bit", "-nf4", "-gguf", "-hf"];
        while let Some(rest) = FORMS.iter().find_map(|form| model.strip_suffix(form)) {
            model = rest.to_owned();
        }
        (!path && !model.is_empty()).then_some(model)
    };
    matches!((model(a), model(b)), (Some(a), Some(b)) if a != b)
}

#[cfg(test)]
mod tests {
    use super::is_another;

    #[test]
    fn another_base_is_told_by_names_of_the_hub_alone() {
        for (a, b, another) in [
            ("meta/Tiny-1B", "unsloth/tiny-1b-unsloth-bnb-4bit", false),
            ("meta/Tiny-1B", "other/Tiny-1B-GGUF", false),
            ("meta/Tiny-1B", "meta/Tiny-3B", true),
            ("meta/Tiny-1B", "/models/other", false),
            ("./models/a", "meta/b", false),
            ("a", "meta/b", false),
        ] {
            assert_eq!(is_another(a, b), another, "{a} {b}");
        }
    }
}
