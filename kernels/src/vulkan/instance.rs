//! The Vulkan library and, on request, its validation layers.

#![allow(unsafe_code, reason = "calls into the Vulkan loader")]

use super::device_error;
use crate::Error;
use ash::ext::{debug_utils, validation_features};
use ash::vk;
use std::ffi::{CStr, c_void};
use std::sync::{Arc, Mutex, PoisonError};

const VALIDATION_LAYER: &CStr = c"VK_LAYER_KHRONOS_validation";
/// What [`super::Vulkan::new`] obeys.
const VALIDATE: &str = "POCKETLORA_VULKAN_VALIDATE";
/// Messages kept; one mistake in a loop would fill memory otherwise.
const KEPT: usize = 64;

/// What the validation layers found wrong with our use of Vulkan: nothing, unless there is a bug.
///
/// Outlives the device, whose destruction is checked as well.
#[derive(Debug, Default)]
pub struct Validation(Mutex<Vec<String>>);

impl Validation {
    /// The first messages, empty if all is well.
    #[must_use]
    pub fn errors(&self) -> Vec<String> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// The loaded library and one instance.
pub(super) struct Instance {
    pub raw: ash::Instance,
    messenger: Option<Messenger>,
    /// Unloads the library when dropped, hence last.
    _entry: ash::Entry,
}

struct Messenger {
    functions: debug_utils::Instance,
    raw: vk::DebugUtilsMessengerEXT,
    validation: Arc<Validation>,
}

impl Instance {
    /// Vulkan 1.1 or later, with validation if `POCKETLORA_VULKAN_VALIDATE` is `1`.
    pub fn new() -> Result<Self, Error> {
        // SAFETY: loading runs the initializers of the system's Vulkan library, which we have to trust.
        let entry = unsafe { ash::Entry::load() }.map_err(|e| Error::Device(format!("no Vulkan library: {e}")))?;
        // SAFETY: the entry was just loaded, as for all calls on it below.
        let version = unsafe { entry.try_enumerate_instance_version() }.map_err(device_error("vulkan version"))?;
        if version.is_none_or(|version| version < vk::API_VERSION_1_1) {
            return Err(Error::Device("the Vulkan library is older than version 1.1".to_owned()));
        }
        let validate = std::env::var(VALIDATE).is_ok_and(|value| value == "1");
        let (mut layers, mut extensions) = (vec![], vec![]);
        if validate {
            // SAFETY: as above.
            let known =
                unsafe { entry.enumerate_instance_layer_properties() }.map_err(device_error("vulkan layers"))?;
            if !known.iter().any(|layer| layer.layer_name_as_c_str() == Ok(VALIDATION_LAYER)) {
                let layer = VALIDATION_LAYER.to_string_lossy();
                return Err(Error::Device(format!("`{VALIDATE}` is set, but the layer `{layer}` is not installed")));
            }
            layers.push(VALIDATION_LAYER.as_ptr());
            extensions.extend([debug_utils::NAME.as_ptr(), validation_features::NAME.as_ptr()]);
        }
        let application = vk::ApplicationInfo::default().api_version(vk::API_VERSION_1_1);
        // Finds missing barriers, which a software driver would not show in results.
        let enabled = [vk::ValidationFeatureEnableEXT::SYNCHRONIZATION_VALIDATION];
        let mut features = vk::ValidationFeaturesEXT::default().enabled_validation_features(&enabled);
        let mut info = vk::InstanceCreateInfo::default()
            .application_info(&application)
            .enabled_layer_names(&layers)
            .enabled_extension_names(&extensions);
        if validate {
            info = info.push_next(&mut features);
        }
        // SAFETY: all that `info` points to lives until after the call.
        let raw = unsafe { entry.create_instance(&info, None) }.map_err(device_error("vulkan instance"))?;
        let mut instance = Self { raw, messenger: None, _entry: entry };
        if validate {
            instance.messenger = Some(Messenger::new(&instance)?);
        }
        Ok(instance)
    }

    pub fn validation(&self) -> Option<Arc<Validation>> {
        self.messenger.as_ref().map(|messenger| Arc::clone(&messenger.validation))
    }
}

impl Drop for Instance {
    fn drop(&mut self) {
        // SAFETY: `Device` owns this and has destroyed itself by now; the messenger's `Arc` is still held.
        unsafe {
            if let Some(messenger) = &self.messenger {
                messenger.functions.destroy_debug_utils_messenger(messenger.raw, None);
            }
            self.raw.destroy_instance(None);
        }
    }
}

impl Messenger {
    fn new(instance: &Instance) -> Result<Self, Error> {
        let functions = debug_utils::Instance::new(&instance._entry, &instance.raw);
        let validation = Arc::new(Validation::default());
        let info = vk::DebugUtilsMessengerCreateInfoEXT::default()
            .message_severity(vk::DebugUtilsMessageSeverityFlagsEXT::ERROR)
            .message_type(vk::DebugUtilsMessageTypeFlagsEXT::VALIDATION)
            .pfn_user_callback(Some(on_message))
            .user_data(Arc::as_ptr(&validation).cast_mut().cast());
        // SAFETY: the instance has the extension; the `Validation` lives until the messenger is destroyed.
        let raw = unsafe { functions.create_debug_utils_messenger(&info, None) };
        Ok(Self { functions, raw: raw.map_err(device_error("vulkan messenger"))?, validation })
    }
}

/// Keeps a message.
///
/// # Safety
/// `user` is the [`Validation`] that the messenger was made with, `data` what the layer promises.
unsafe extern "system" fn on_message(
    _severity: vk::DebugUtilsMessageSeverityFlagsEXT,
    _types: vk::DebugUtilsMessageTypeFlagsEXT,
    data: *const vk::DebugUtilsMessengerCallbackDataEXT<'_>,
    user: *mut c_void,
) -> vk::Bool32 {
    // SAFETY: guaranteed by the caller; the lock makes shared access from several threads fine.
    let (validation, message) = unsafe { (&*user.cast::<Validation>(), (*data).message_as_c_str()) };
    let message = message.map_or_else(String::new, |message| message.to_string_lossy().into_owned());
    let mut errors = validation.0.lock().unwrap_or_else(PoisonError::into_inner);
    if errors.len() < KEPT {
        errors.push(message);
    }
    // The call that was wrong goes on: false is the only value that applications may return.
    vk::FALSE
}
