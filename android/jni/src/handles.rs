//! What Kotlin's numbers stand for.
//!
//! The JVM calls functions without a context of ours, so that this table is the one thing that is global. A call takes out
//! an `Arc`: what is closed while it is at work lives to the call's end. A number is given once in a process; one that was
//! freed, twice or by another thread, or that is of another kind, is found to be so.

use pocketlora::{AdapterId, Cancel, Chat, Engine, Error, ErrorCode, Result, TrainHandle, Trainer};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};

/// A conversation.
pub struct ChatHeld {
    pub chat: Mutex<Chat>,
}

/// An attached adapter.
pub struct AdapterHeld {
    pub engine: Engine,
    pub id: AdapterId,
}

/// A run.
pub struct TrainerHeld {
    pub trainer: Mutex<Trainer>,
    pub handle: TrainHandle,
    pub engine: Engine,
    pub resumed: bool,
}

#[derive(Clone)]
pub enum Held {
    Engine(Engine),
    Chat(Arc<ChatHeld>),
    Adapter(Arc<AdapterHeld>),
    Trainer(Arc<TrainerHeld>),
    Cancel(Cancel),
}

struct Table {
    last: i64,
    held: BTreeMap<i64, Held>,
}

static TABLE: Mutex<Table> = Mutex::new(Table { last: 0, held: BTreeMap::new() });

fn table() -> MutexGuard<'static, Table> {
    TABLE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A new number for `held`.
pub fn hold(held: Held) -> i64 {
    let mut table = table();
    table.last += 1;
    let number = table.last;
    table.held.insert(number, held);
    number
}

/// Lets go of what `number` stands for; a run that is at work stops, with a checkpoint. Nothing happens the second time.
pub fn free(number: i64) {
    // What is dropped may take long, and is no more in the table then.
    let held = table().held.remove(&number);
    if let Some(Held::Trainer(trainer)) = held {
        trainer.handle.cancel();
    }
}

fn find<T>(number: i64, kind: &str, pick: impl FnOnce(&Held) -> Option<T>) -> Result<T> {
    let table = table();
    let message = match table.held.get(&number) {
        Some(held) => match pick(held) {
            Some(found) => return Ok(found),
            None => format!("expected a handle of a {kind}, got another's; this is a bug of the wrapper"),
        },
        None => format!("expected an open {kind}, got one that was closed; open it again"),
    };
    Err(Error::new(ErrorCode::Handle, kind, message))
}

pub fn engine(number: i64) -> Result<Engine> {
    find(number, "engine", |held| if let Held::Engine(engine) = held { Some(engine.clone()) } else { None })
}

pub fn chat(number: i64) -> Result<Arc<ChatHeld>> {
    find(number, "chat", |held| if let Held::Chat(chat) = held { Some(Arc::clone(chat)) } else { None })
}

pub fn adapter(number: i64) -> Result<Arc<AdapterHeld>> {
    find(number, "adapter", |held| if let Held::Adapter(adapter) = held { Some(Arc::clone(adapter)) } else { None })
}

pub fn trainer(number: i64) -> Result<Arc<TrainerHeld>> {
    find(number, "trainer", |held| if let Held::Trainer(trainer) = held { Some(Arc::clone(trainer)) } else { None })
}

pub fn cancel(number: i64) -> Result<Cancel> {
    find(number, "cancel", |held| if let Held::Cancel(cancel) = held { Some(cancel.clone()) } else { None })
}

/// What only one call may work with at a time. A panic in an earlier call is no reason to refuse this one.
pub fn only<'a, T>(held: &'a Mutex<T>, kind: &str) -> Result<MutexGuard<'a, T>> {
    match held.try_lock() {
        Ok(guard) => Ok(guard),
        Err(TryLockError::Poisoned(guard)) => Ok(guard.into_inner()),
        Err(TryLockError::WouldBlock) => {
            let message = format!("expected a {kind} that is free, got one at work for another call; wait for its end");
            Err(Error::new(ErrorCode::Busy, kind, message))
        }
    }
}
