//! What `io.pocketlora.Native` declares, one function each: it reads arguments, calls the session facade and gives results
//! back. It holds no logic. Kotlin gives a handle's number; what it stands for is in `handles.rs`. An error or a panic
//! becomes an exception (`failure.rs`), and an exception that a listener throws ends the work and goes on as it is.
//!
//! Settings come as JSON, for which Kotlin needs no reader; results are numbers, texts and calls of listeners.

#![allow(non_snake_case)] // names as the JVM looks for them
// Who calls is the JVM, which looks them up by name.
#![allow(missing_docs)]

mod adapters;
mod chat;
mod engine;
mod failure;
mod handles;
mod train;

use failure::Failure;
use jni::Env;
use jni::objects::{JByteArray, JLongArray, JObjectArray, JString};

/// A function of `io.pocketlora.Native`. Its body may fail and panic.
macro_rules! native {
    ($name:ident($env:ident $(, $arg:ident: $type:ty)* $(,)?) -> $out:ty $body:block) => {
        // Sound: the name begins with that of a class of ours, and no other function has it.
        #[unsafe(no_mangle)]
        pub extern "system" fn $name<'local>(
            mut unowned: jni::EnvUnowned<'local>,
            _class: jni::objects::JClass<'local>
            $(, $arg: $type)*
        ) -> $out {
            let work = |$env: &mut jni::Env<'local>| -> Result<$out, $crate::failure::Failure> { $body };
            unowned.with_env(work).resolve::<$crate::failure::Throw>()
        }
    };
}
pub(crate) use native;

/// A text of Kotlin's.
fn text(env: &Env<'_>, text: &JString<'_>) -> Result<String, Failure> {
    Ok(text.try_to_string(env)?)
}

/// A text that may be null.
fn optional(env: &Env<'_>, string: &JString<'_>) -> Result<Option<String>, Failure> {
    if string.is_null() { Ok(None) } else { text(env, string).map(Some) }
}

/// Bytes of Kotlin's.
fn bytes(env: &Env<'_>, array: &JByteArray<'_>) -> Result<Vec<u8>, Failure> {
    Ok(env.convert_byte_array(array)?)
}

fn longs<'local>(env: &mut Env<'local>, values: &[i64]) -> Result<JLongArray<'local>, Failure> {
    let array = JLongArray::new(env, values.len())?;
    array.set_region(env, 0, values)?;
    Ok(array)
}

fn texts<'local>(
    env: &mut Env<'local>,
    values: impl ExactSizeIterator<Item = String>,
) -> Result<JObjectArray<'local, JString<'local>>, Failure> {
    let empty = JString::new(env, "")?;
    let array = JObjectArray::<JString<'_>>::new(env, values.len(), &empty)?;
    for (i, value) in values.enumerate() {
        let value = JString::new(env, value)?;
        array.set_element(env, i, &value)?;
        env.delete_local_ref(value);
    }
    Ok(array)
}

native!(Java_io_pocketlora_Native_version(env) -> JString<'local> {
    Ok(JString::new(env, env!("CARGO_PKG_VERSION"))?)
});

native!(Java_io_pocketlora_Native_errorCodes(env) -> JObjectArray<'local, JString<'local>> {
    let codes = pocketlora::ErrorCode::ALL.map(|code| format!("{code:?}={}", code.number()));
    texts(env, codes.into_iter())
});

native!(Java_io_pocketlora_Native_free(_env, handle: i64) -> () {
    handles::free(handle);
    Ok(())
});

#[cfg(feature = "panics")]
native!(Java_io_pocketlora_Panics_panic(_env) -> () {
    panic!("a bug on purpose")
});
