package io.pocketlora

/**
 * What the library refuses or fails at. [code] never changes between versions, [message] says what was expected, what was
 * found and what to do next, [item] what failed (a file, a tensor, a setting), [next] the next step if there is one.
 */
sealed class PocketLoraException(
    val code: Int,
    override val message: String,
    val item: String,
    val next: String?,
) : Exception(message) {
    /** A file could not be read or written. */
    class Io(message: String, item: String, next: String?) : PocketLoraException(1, message, item, next)

    /** A file is not what its format asks for. */
    class Format(message: String, item: String, next: String?) : PocketLoraException(2, message, item, next)

    /** A well-formed file asks for something that this version does not do. */
    class Unsupported(message: String, item: String, next: String?) : PocketLoraException(3, message, item, next)

    /** An adapter does not belong to this model. */
    class AdapterMismatch(message: String, item: String, next: String?) : PocketLoraException(4, message, item, next)

    /** Data to learn from or to evaluate on is empty, malformed or unusable. */
    class Data(message: String, item: String, next: String?) : PocketLoraException(5, message, item, next)

    /** A setting is out of range or contradicts another. */
    class Config(message: String, item: String, next: String?) : PocketLoraException(6, message, item, next)

    /** An allocation was refused, or a memory budget does not suffice. */
    class OutOfMemory(message: String, item: String, next: String?) : PocketLoraException(7, message, item, next)

    /** A device failed or was lost. */
    class Device(message: String, item: String, next: String?) : PocketLoraException(8, message, item, next)

    /** A download failed or its checksum is wrong. */
    class Network(message: String, item: String, next: String?) : PocketLoraException(9, message, item, next)

    /** The work was stopped, by [Chat.cancel] for instance. A cancelled coroutine throws its own exception. */
    class Cancelled(message: String, item: String, next: String?) : PocketLoraException(10, message, item, next)

    /** Loss or gradients became NaN or infinite. */
    class Diverged(message: String, item: String, next: String?) : PocketLoraException(11, message, item, next)

    /** A text has more tokens than the context takes. */
    class ContextFull(message: String, item: String, next: String?) : PocketLoraException(12, message, item, next)

    /** It was closed. */
    class Closed(message: String, item: String, next: String?) : PocketLoraException(13, message, item, next)

    /** A chat or trainer is at work for another caller. */
    class Busy(message: String, item: String, next: String?) : PocketLoraException(14, message, item, next)

    /** A bug in the library, which was caught at its border. */
    class Internal(message: String, item: String, next: String?) : PocketLoraException(15, message, item, next)

    /** A sealed adapter is not for this key, or not signed by that one. */
    class Key(message: String, item: String, next: String?) : PocketLoraException(16, message, item, next)

    /** A sealed adapter is older than the least version that is taken. */
    class Outdated(message: String, item: String, next: String?) : PocketLoraException(17, message, item, next)

    /** A code that a later version of the library has. */
    class Unknown(code: Int, message: String, item: String, next: String?) :
        PocketLoraException(code, message, item, next)

    companion object {
        /** Makes the exception of a code; the library calls it by name. */
        @JvmStatic
        @JvmName("of")
        internal fun of(code: Int, message: String, item: String, next: String?): PocketLoraException = when (code) {
            1 -> Io(message, item, next)
            2 -> Format(message, item, next)
            3 -> Unsupported(message, item, next)
            4 -> AdapterMismatch(message, item, next)
            5 -> Data(message, item, next)
            6 -> Config(message, item, next)
            7 -> OutOfMemory(message, item, next)
            8 -> Device(message, item, next)
            9 -> Network(message, item, next)
            10 -> Cancelled(message, item, next)
            11 -> Diverged(message, item, next)
            12 -> ContextFull(message, item, next)
            13 -> Closed(message, item, next)
            14 -> Busy(message, item, next)
            15 -> Internal(message, item, next)
            16 -> Key(message, item, next)
            17 -> Outdated(message, item, next)
            else -> Unknown(code, message, item, next)
        }
    }
}
