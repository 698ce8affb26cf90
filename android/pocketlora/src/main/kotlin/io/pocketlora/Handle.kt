package io.pocketlora

import java.util.concurrent.atomic.AtomicLong
import kotlinx.coroutines.CancellationException
import kotlinx.coroutines.Dispatchers
import kotlinx.coroutines.async
import kotlinx.coroutines.coroutineScope
import kotlinx.coroutines.withContext

/**
 * What stands for an object of the library. It is freed once, by the first [close]; what is called afterwards throws
 * [PocketLoraException.Closed], and what is at work meanwhile keeps the object alive to its end.
 */
abstract class Handle internal constructor(number: Long) : AutoCloseable {
    private val number = AtomicLong(number)

    /** The library's number for it, which it does not know if this is closed. */
    internal val id: Long get() = number.get()

    /** Whether it was closed. */
    val isClosed: Boolean get() = number.get() == CLOSED

    override fun close() {
        val freed = number.getAndSet(CLOSED)
        if (freed != CLOSED) free(freed)
    }

    internal open fun free(number: Long) = Native.free(number)

    private companion object {
        /** No object has it. */
        const val CLOSED = 0L
    }
}

/** Runs a call that may take long where it does not hold up the caller's thread. */
internal suspend fun <T> offMain(call: () -> T): T = withContext(Dispatchers.IO) { call() }

/** As [offMain], and calls [onCancel] from another thread when the coroutine is cancelled; the call then ends by itself. */
internal suspend fun <T> offMain(onCancel: () -> Unit, call: () -> T): T = coroutineScope {
    val work = async(Dispatchers.IO) { call() }
    try {
        work.await()
    } catch (e: CancellationException) {
        onCancel()
        throw e
    }
}

/** A wish to stop, of one call. */
internal class Token : AutoCloseable {
    private val number = Native.cancelNew()
    internal val id get() = number

    fun cancel() = Native.cancel(number)

    override fun close() = Native.free(number)
}
