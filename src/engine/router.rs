//! Adapters chosen by what is asked: each lies in a folder of one folder, with a centroid of what it was taught about, and
//! every request is answered with the few that lie nearest (LoRARetriever, Zhao et al. 2024, arXiv:2402.09997).
//!
//! A request's vector `q` is the mean row of the embedding over its tokens; of a conversation, over the user's turns, each
//! counting half as much as the one after it. With `m` the mean of all centroids `c_i`, the similarity is
//! `s_i = cos(q - m, c_i - m)`: what all texts have in common says nothing. The nearest `most` are mixed, their effects
//! multiplied by weights `softmax(s / 0.1)` in steps of a tenth, so that nearly equal requests get the same mix, and what the
//! model has read of a conversation stays.

use super::adapters::{AdapterSet, Entry, Registry, Values};
use super::{AdapterId, Attached, Engine, lock};
use crate::adapter::{AdapterFile, Adapters, CENTROID, Centroid, mean_row};
use crate::chat::Message;
use crate::error::{Error, ErrorCode, Result};
use crate::text::Text;
use crate::train::{Sample, fingerprint};
use pocketlora_kernels::Cpu;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// A difference of similarities that makes one adapter `e` times as strong as another.
const TEMPERATURE: f64 = 0.1;
/// Steps of weights from 0 to 1.
const STEPS: f64 = 10.0;

/// An adapter that was picked for a request.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct Pick {
    /// Name of its folder.
    pub name: String,
    /// How near it lies, from -1 to 1.
    pub similarity: f64,
    /// What its effect is multiplied by; the weights of a request add up to 1.
    pub weight: f32,
}

/// An adapter that requests may pick.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct Routed {
    /// It, without a mix; what it is multiplied by is a request's.
    pub adapter: Attached,
    /// How many texts its centroid is of.
    pub texts: u64,
    /// How many requests it was the nearest of.
    pub nearest: u64,
}

/// Adapters to choose from, all on the device.
pub(crate) struct Router {
    entries: Vec<Entry>,
    pool: Adapters<Cpu>,
    text: Option<Arc<Text>>,
    /// `c_i - m`, at length 1.
    directions: Vec<Vec<f32>>,
    /// `m`.
    mean: Vec<f32>,
    texts: Vec<u64>,
    nearest: Vec<AtomicU64>,
    most: usize,
}

/// What a chat answers with.
pub(super) struct Choice {
    pub router: Arc<Router>,
    pub picks: Vec<Pick>,
    pub set: Arc<AdapterSet>,
}

impl Router {
    /// How near the adapters lie to `query`, `[C]`.
    fn similarities(&self, query: &[f32]) -> Vec<f64> {
        let query = direction(query, &self.mean);
        self.directions.iter().map(|own| dot(own, &query)).collect()
    }

    /// Places and weights of those that are mixed for `similarities`, the nearest first.
    fn weights(&self, similarities: &[f64]) -> Vec<(usize, f32)> {
        let mut order: Vec<usize> = (0..similarities.len()).collect();
        order.sort_by(|a, b| similarities[*b].total_cmp(&similarities[*a]));
        order.truncate(self.most);
        let Some(first) = order.first() else { return Vec::new() };
        let shares: Vec<f64> =
            order.iter().map(|at| ((similarities[*at] - similarities[*first]) / TEMPERATURE).exp()).collect();
        let all: f64 = shares.iter().sum();
        let mut steps: Vec<f64> = shares.iter().map(|share| (share / all * STEPS).round()).collect();
        // What rounding leaves over is the nearest one's.
        steps[0] += STEPS - steps.iter().sum::<f64>();
        let weights = order.into_iter().zip(steps.into_iter().map(|steps| (steps / STEPS) as f32));
        weights.filter(|(_, weight)| *weight > 0.0).collect()
    }

    fn name(&self, at: usize) -> String {
        name_of(&self.entries[at].told.dir)
    }

    /// The picks for the vector `query` of a request, none without one.
    fn pick(&self, query: Option<&[f32]>) -> Vec<Pick> {
        let Some(query) = query else { return Vec::new() };
        let similarities = self.similarities(query);
        let weights = self.weights(&similarities);
        let pick = |(at, weight): (usize, f32)| Pick { name: self.name(at), similarity: similarities[at], weight };
        weights.into_iter().map(pick).collect()
    }

    /// The adapters that `picks` names, in the order in which they were attached.
    pub(super) fn set(&self, picks: &[Pick]) -> Result<Arc<AdapterSet>> {
        let weight = |at: usize| picks.iter().find(|pick| pick.name == self.name(at)).map(|pick| (at, pick.weight));
        self.mix(&(0..self.entries.len()).filter_map(weight).collect::<Vec<_>>())
    }

    fn mix(&self, weights: &[(usize, f32)]) -> Result<Arc<AdapterSet>> {
        let adapters = self.pool.mixed(weights)?.expect("only adapters that can be left out are taken");
        let ids = weights.iter().map(|(at, _)| self.entries[*at].told.id).collect();
        let scales = weights.iter().map(|(_, weight)| *weight).collect();
        Ok(Arc::new(AdapterSet { ids, scales, adapters, text: self.text.clone() }))
    }

    /// Those attached to it, by their numbers.
    pub(super) fn entry(&self, id: AdapterId) -> Option<&Entry> {
        self.entries.iter().find(|entry| entry.told.id == id)
    }

    /// The mix of those with these hashes and weights, if all are here.
    pub(super) fn set_with(&self, identities: &[(u64, f32)]) -> Result<Option<Mix>> {
        let place = |(hash, weight): &(u64, f32)| {
            let at =
                self.entries.iter().position(|entry| matches!(entry.values, Values::Folder(own) if own == *hash))?;
            Some((at, *weight))
        };
        let Some(weights) = identities.iter().map(place).collect::<Option<Vec<_>>>() else { return Ok(None) };
        let pick = |(at, weight): &(usize, f32)| Pick { name: self.name(*at), similarity: f64::NAN, weight: *weight };
        Ok(Some((weights.iter().map(pick).collect(), self.mix(&weights)?)))
    }
}

/// What was picked, and the adapters themselves.
type Mix = (Vec<Pick>, Arc<AdapterSet>);

fn dot(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
}

/// `values - mean`, at length 1 unless it is zero.
fn direction(values: &[f32], mean: &[f32]) -> Vec<f32> {
    let mut own: Vec<f32> = values.iter().zip(mean).map(|(value, mean)| value - mean).collect();
    let length = dot(&own, &own).sqrt();
    if length > 0.0 {
        own.iter_mut().for_each(|value| *value = (f64::from(*value) / length) as f32);
    }
    own
}

/// The name of an adapter's folder.
pub(crate) fn name_of(dir: &Path) -> String {
    dir.file_name().map_or_else(|| dir.display().to_string(), |name| name.to_string_lossy().into_owned())
}

/// The folders with adapters in `dir`, by their names.
///
/// # Errors
/// It is no folder, is an adapter itself, or holds none.
pub(crate) fn adapters_in(dir: &Path) -> Result<Vec<PathBuf>> {
    let place = || format!("`{}`", dir.display());
    if AdapterFile::is_at(dir) {
        let message = "expected a folder with a folder for each adapter, got an adapter; give the folder around it, or the adapter \
                       with `-a`";
        return Err(Error::new(ErrorCode::Config, place(), message));
    }
    let found = std::fs::read_dir(dir).map_err(|e| Error::io("read", dir, e))?;
    let mut dirs: Vec<PathBuf> =
        found.flatten().map(|entry| entry.path()).filter(|path| AdapterFile::exists(path)).collect();
    dirs.sort();
    if dirs.is_empty() {
        let message =
            "expected a folder with a folder for each adapter, got none in it; `pocketlora train -o` writes one";
        return Err(Error::new(ErrorCode::Config, place(), message));
    }
    Ok(dirs)
}

impl Engine {
    /// Has every request of chats and evaluations pick among the adapters in the folders of `dir`, and mix the nearest, `most`
    /// of them at most. All are on the device from now on, so that a mix takes no time. [`Engine::detach_all`] ends it.
    ///
    /// # Errors
    /// `most` is 0; adapters are attached, or chosen this way already; there are none in `dir`; one is broken, for another
    /// base, has no centroid or one of another width, or does what cannot be mixed. Nothing changes then.
    pub fn route(&self, dir: &Path, most: usize) -> Result<()> {
        if most == 0 {
            return Err(Error::config("route", "a whole number of adapters from 1", most));
        }
        let dirs = adapters_in(dir)?;
        let files = dirs.iter().map(|dir| AdapterFile::open(dir)).collect::<Result<Vec<_>>>()?;
        let centroids = centroids_of(&dirs, self.base().model.config().hidden_size)?;
        let mut registry = lock(&self.0.adapters);
        if !registry.entries.is_empty() || registry.router.is_some() {
            let message = "expected an engine without attached adapters, got some; detach them first";
            return Err(Error::new(ErrorCode::Config, "route", message));
        }
        let (mut entries, mut pool) = (Vec::new(), Adapters::none(self.base()));
        for file in files {
            if !Adapters::<Cpu>::takes_for_mixing(&file) {
                let message = format!(
                    "expected adapters that can be mixed, got one with {}{}; take it out of the folder, and use it with `-a`",
                    file.method.kind().name(),
                    if file.replaced.is_empty() { "" } else { " and weights in place of the base's" }
                );
                return Err(Error::new(ErrorCode::Unsupported, format!("`{}`", file.dir.display()), message));
            }
            self.check_strictly(&file)?;
            let own = self.own_text(&file, &entries)?;
            let id = AdapterId(registry.last + 1 + entries.len() as u64);
            let told = Attached { id, dir: file.dir.clone(), scale: 1.0, warnings: self.doubts(&file)? };
            pool.attach(self.base(), &file, 1.0, self.0.precision.adapters())?;
            entries.push(Entry { told, values: Values::Folder(fingerprint(&file)), own });
        }
        let text = self.text_with(&entries);
        registry.last += entries.len() as u64;
        let mean = mean_of(&centroids);
        let router = Router {
            directions: centroids.iter().map(|centroid| direction(&centroid.values, &mean)).collect(),
            texts: centroids.iter().map(|centroid| centroid.texts).collect(),
            nearest: entries.iter().map(|_| AtomicU64::new(0)).collect(),
            entries,
            pool,
            text: text.clone(),
            mean,
            most,
        };
        // What asks for no answer works without adapters.
        registry.all = Registry::new(self.base(), text).all;
        registry.router = Some(Arc::new(router));
        Ok(())
    }

    /// The adapters that requests pick from; none without [`Engine::route`].
    #[must_use]
    pub fn routed(&self) -> Vec<Routed> {
        let Some(router) = self.router() else { return Vec::new() };
        let counts = router.texts.iter().zip(&router.nearest);
        let routed = |(entry, (texts, nearest)): (&Entry, (&u64, &AtomicU64))| Routed {
            adapter: entry.told.clone(),
            texts: *texts,
            nearest: nearest.load(Ordering::Relaxed),
        };
        router.entries.iter().zip(counts).map(routed).collect()
    }

    pub(super) fn router(&self) -> Option<Arc<Router>> {
        lock(&self.0.adapters).router.clone()
    }

    /// The vector of texts as tokens, each counting half as much as the one after it; none where none has a token.
    fn query(&self, texts: &[Vec<u32>]) -> Result<Option<Vec<f32>>> {
        let (mut sum, mut weight, mut all) = (Vec::new(), 1.0f32, 0.0f32);
        for ids in texts.iter().rev() {
            let Some(mean) = mean_row(self.base(), ids)? else { continue };
            sum.resize(mean.len(), 0.0f32);
            sum.iter_mut().zip(mean).for_each(|(sum, value)| *sum += weight * value);
            all += weight;
            weight /= 2.0;
        }
        sum.iter_mut().for_each(|sum| *sum /= all);
        Ok((!sum.is_empty()).then_some(sum))
    }

    /// The adapters for a request of these texts: those that it picks, or else all that are attached.
    pub(crate) fn set_for(&self, texts: &[Vec<u32>]) -> Result<Arc<AdapterSet>> {
        let Some(router) = self.router() else { return Ok(self.all()) };
        let picks = self.picked(&router, texts)?;
        router.set(&picks)
    }

    /// The adapters for the question, or the text, that `sample` is.
    pub(crate) fn set_for_sample(&self, sample: &Sample) -> Result<Arc<AdapterSet>> {
        self.set_for(&[sample.question()])
    }

    /// The adapters for what users say in `messages`.
    #[cfg(feature = "metrics")]
    pub(crate) fn set_for_messages(&self, messages: &[Message]) -> Result<Arc<AdapterSet>> {
        self.set_for(&self.said(messages)?)
    }

    pub(super) fn picked(&self, router: &Router, texts: &[Vec<u32>]) -> Result<Vec<Pick>> {
        let query = self.query(texts)?;
        let picks = router.pick(query.as_deref());
        let nearest = picks.first().and_then(|pick| (0..router.entries.len()).find(|at| router.name(*at) == pick.name));
        if let Some(at) = nearest {
            router.nearest[at].fetch_add(1, Ordering::Relaxed);
        }
        Ok(picks)
    }

    /// What users say in `messages`, or else the last of them, as tokens.
    pub(super) fn said(&self, messages: &[Message]) -> Result<Vec<Vec<u32>>> {
        let tokenizer = &self.text()?.tokenizer;
        let contents =
            |role: &str| messages.iter().filter(|m| m.role == role).filter_map(|m| m.content.as_deref()).collect();
        let mut said: Vec<&str> = contents("user");
        if said.is_empty() {
            said.extend(messages.iter().rev().find_map(|m| m.content.as_deref()));
        }
        said.into_iter().map(|text| tokenizer.encode(text, false)).collect()
    }
}

/// The centroids of the adapters in `dirs`, of a base whose embedding is `width` wide.
fn centroids_of(dirs: &[PathBuf], width: usize) -> Result<Vec<Centroid>> {
    let (mut all, mut without) = (Vec::with_capacity(dirs.len()), Vec::new());
    for dir in dirs {
        match Centroid::read(dir)? {
            Some(centroid) if centroid.values.len() != width => {
                let message = format!(
                    "expected a centroid of the width `{width}` of this base, got `{}`; use the base that the adapter was trained \
                     on, or write it anew with `pocketlora centroid`",
                    centroid.values.len()
                );
                let place = format!("`{}`", dir.join(CENTROID).display());
                return Err(Error::new(ErrorCode::AdapterMismatch, place, message));
            }
            Some(centroid) => all.push(centroid),
            None => without.push(dir.display().to_string()),
        }
    }
    if without.is_empty() {
        return Ok(all);
    }
    let message = format!(
        "expected a `{CENTROID}` in the folder of each adapter, got none there; `pocketlora centroid ADAPTER -d DATA` writes it, of \
         the data that the adapter was trained on"
    );
    Err(Error::new(ErrorCode::Config, format!("`{}`", without.join("`, `")), message))
}

/// The mean of several centroids; of one nothing is taken, for then there is nothing to tell apart.
fn mean_of(centroids: &[Centroid]) -> Vec<f32> {
    let width = centroids.first().map_or(0, |centroid| centroid.values.len());
    let mut mean = vec![0.0; width];
    for centroid in centroids.iter().filter(|_| centroids.len() > 1) {
        mean.iter_mut().zip(&centroid.values).for_each(|(mean, value)| *mean += value / centroids.len() as f32);
    }
    mean
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::Options;

    fn router(most: usize, count: usize) -> Router {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/oracles/tiny-mistral");
        let engine = Engine::open(&dir, &Options::new().threads(1)).unwrap();
        Router {
            entries: Vec::new(),
            pool: Adapters::none(engine.base()),
            text: None,
            directions: Vec::new(),
            mean: Vec::new(),
            texts: Vec::new(),
            nearest: (0..count).map(|_| AtomicU64::new(0)).collect(),
            most,
        }
    }

    #[test]
    fn weights_are_tenths_that_add_up_to_one_the_nearest_first() {
        for (most, similarities, expected) in [
            (1, &[0.1, 0.5, 0.2][..], &[(1, 1.0)][..]),
            (3, &[0.9, -0.5, 0.1], &[(0, 1.0)]),
            (2, &[0.5, 0.5, 0.5], &[(0, 0.5), (1, 0.5)]),
            (3, &[0.5, 0.5, 0.5], &[(0, 0.4), (1, 0.3), (2, 0.3)]),
            (3, &[0.3, 0.4], &[(1, 0.7), (0, 0.3)]),
            (9, &[0.0], &[(0, 1.0)]),
            (2, &[], &[]),
        ] {
            assert_eq!(router(most, similarities.len()).weights(similarities), expected, "{most} {similarities:?}");
        }
    }

    #[test]
    fn of_one_centroid_nothing_is_taken_off() {
        let centroid = |values: &[f32]| Centroid { values: values.to_vec(), texts: 1 };
        assert_eq!(mean_of(&[centroid(&[1.0, 2.0])]), [0.0, 0.0]);
        assert_eq!(mean_of(&[centroid(&[1.0, 2.0]), centroid(&[3.0, 0.0])]), [2.0, 1.0]);
        assert_eq!(direction(&[3.0, 4.0], &[0.0, 0.0]), [0.6, 0.8]);
        assert_eq!(direction(&[1.0], &[1.0]), [0.0]);
    }
}
