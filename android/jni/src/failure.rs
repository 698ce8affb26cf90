//! Errors and panics as exceptions of Kotlin's.

use jni::errors::ErrorPolicy;
use jni::objects::{JString, JThrowable, JValue};
use jni::{Env, jni_sig, jni_str};
use pocketlora::{Error, ErrorCode};
use std::any::Any;

/// What ended a call.
pub enum Failure {
    Own(Error),
    /// The JVM's; an exception of a listener is pending, or something of the bridge itself failed.
    Jvm(jni::errors::Error),
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self::Own(error)
    }
}

impl From<jni::errors::Error> for Failure {
    fn from(error: jni::errors::Error) -> Self {
        Self::Jvm(error)
    }
}

/// Throws, and gives the JVM a value that it does not look at.
pub struct Throw;

impl<T: Default> ErrorPolicy<T, Failure> for Throw {
    type Captures<'unowned: 'method, 'method> = ();

    fn on_error<'unowned: 'method, 'method>(
        env: &mut Env<'unowned>,
        _captures: &mut Self::Captures<'unowned, 'method>,
        failure: Failure,
    ) -> jni::errors::Result<T> {
        // What a listener has thrown goes on as it is.
        if !env.exception_check() {
            let error = match failure {
                Failure::Own(error) => error,
                Failure::Jvm(error) => Error::new(ErrorCode::Internal, "the JVM", error.to_string()),
            };
            throw(env, &error)?;
        }
        Ok(T::default())
    }

    fn on_panic<'unowned: 'method, 'method>(
        env: &mut Env<'unowned>,
        _captures: &mut Self::Captures<'unowned, 'method>,
        payload: Box<dyn Any + Send + 'static>,
    ) -> jni::errors::Result<T> {
        let said = payload.downcast_ref::<&str>().map(|said| (*said).to_owned());
        let said = said.or_else(|| payload.downcast_ref::<String>().cloned()).unwrap_or_default();
        if !env.exception_check() {
            let message = format!("a bug, which was caught (`{said}`); please report it");
            throw(env, &Error::new(ErrorCode::Internal, "the library", message))?;
        }
        Ok(T::default())
    }
}

fn throw(env: &mut Env<'_>, error: &Error) -> jni::errors::Result<()> {
    let mut causes = String::new();
    let mut cause = std::error::Error::source(error);
    while let Some(inner) = cause {
        causes.push_str(&format!(": {inner}"));
        cause = inner.source();
    }
    let [message, item] = [format!("{error}{causes}"), error.item().to_owned()].map(|text| JString::new(env, text));
    let (message, item) = (message?, item?);
    let next = error.next().map(|next| JString::new(env, next)).transpose()?.unwrap_or_default();
    let class = env.find_class(jni_str!("io/pocketlora/PocketLoraException"))?;
    let thrown = env.call_static_method(
        &class,
        jni_str!("of"),
        jni_sig!("(ILjava/lang/String;Ljava/lang/String;Ljava/lang/String;)Lio/pocketlora/PocketLoraException;"),
        &[JValue::Int(error.code().number() as i32), (&message).into(), (&item).into(), (&next).into()],
    )?;
    let thrown = env.cast_local::<JThrowable<'_>>(thrown.l()?)?;
    env.throw(&thrown)
}
