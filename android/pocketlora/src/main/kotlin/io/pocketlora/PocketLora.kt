package io.pocketlora

/** Arithmetic of inference. */
enum class Precision(internal val key: String) {
    /** f32 everywhere. */
    EXACT("exact"),

    /** Cache and adapters in f16, products in bf16 where the processor has fast ones. */
    BF16("bf16"),

    /** Cache and adapters in f16, products in 8 bits. */
    FAST("fast"),
}

/** How a model is opened. */
data class Options(
    /** Threads; 0 measures at first use how many serve best. */
    val threads: Int = 0,
    val precision: Precision = Precision.FAST,
    /** Most tokens of one conversation; 0 takes what the model was made for. Memory grows with it. */
    val contextTokens: Int = 2048,
    /** Keeps keys and values in 8 bits: half the memory of a long text, at a small cost in quality. */
    val int8Cache: Boolean = false,
    /** Refuses adapters whose files tell that they were trained on another model. */
    val strict: Boolean = true,
    /** A folder for copies that make things faster and can be made again, such as `context.cacheDir`. */
    val cacheDir: String? = null,
    /** What adapters are to name the model by. */
    val baseName: String? = null,
    /** Refuses a model that takes more dirty memory than so many bytes with one full conversation. */
    val memoryBudgetBytes: Long? = null,
) {
    internal fun json() = json(
        mapOf(
            "threads" to threads, "precision" to precision.key, "context" to contextTokens, "int8_cache" to int8Cache,
            "strict" to strict, "cache_dir" to cacheDir, "base_name" to baseName, "memory_budget" to memoryBudgetBytes,
        ),
    )
}

/**
 * Bytes that a model takes. Mapped ones are clean pages of files, which the system may drop at any time; dirty ones are what
 * it counts against the app.
 */
data class MemoryEstimate(
    val parameters: Long,
    val contextTokens: Long,
    val mappedBytes: Long,
    /** Dirty, of the open model. */
    val openBytes: Long,
    /** Dirty, of each 1,000 tokens of each conversation. */
    val bytesPer1000Tokens: Long,
    /** Dirty, of one conversation that fills the context. */
    val fullChatBytes: Long,
    /** Dirty, of a training run, beside the open model. 0 if none was asked about. */
    val trainingBytes: Long,
)

/** What an open model takes now. [anonymousBytes] are those of the whole process. */
data class MemoryUse(val contextTokens: Long, val mappedBytes: Long, val anonymousBytes: Long)

/** Which of a text's tokens become its vector. */
enum class Pooling { MEAN, LAST }

/**
 * An open model. Any number of chats and one trainer at a time work on it; it lives on while one of them does.
 *
 * Functions that take long suspend and work on a thread of `Dispatchers.IO`; others return at once, and may be called from
 * the main thread.
 */
class PocketLora private constructor(number: Long) : Handle(number) {
    /** A conversation of its own, whose answers are sampled as the model recommends. */
    suspend fun chat(options: ChatOptions? = null): Chat = offMain {
        val sampling = Native.recommended(id)
        val chat = Chat(Native.chatNew(id), options ?: ChatOptions(sampling = Sampling.of(sampling)))
        chat.also { closeIfFails(it) { it.apply() } }
    }

    /** Adds the adapter in a folder, its effect multiplied by [scale]; several add up. */
    suspend fun attach(path: String, scale: Float = 1f): Adapter = offMain { Adapter(Native.attach(id, path, scale)) }

    /** Adds an adapter from memory: an app's asset, say. [name] is what messages call it. */
    suspend fun attach(config: ByteArray, tensors: ByteArray, name: String, scale: Float = 1f): Adapter =
        offMain { Adapter(Native.attachBytes(id, config, tensors, name, scale)) }

    /**
     * Adds a sealed adapter, which is opened into memory only. [key] is what it was sealed with; [leastVersion] refuses older
     * ones, and [signer] those that are not signed by this public key.
     */
    suspend fun attachSealed(
        sealed: ByteArray,
        key: ByteArray,
        name: String = "sealed",
        leastVersion: Long = 0,
        signer: ByteArray? = null,
        scale: Float = 1f,
    ): Adapter = offMain { Adapter(Native.attachSealed(id, sealed, name, key, leastVersion, signer, scale)) }

    /** The adapter in a folder, encrypted for this model alone; [signingKey] is a secret Ed25519 key. */
    suspend fun seal(path: String, key: ByteArray, version: Long = 1, signingKey: ByteArray? = null): ByteArray =
        offMain { Native.seal(id, path, key, version, signingKey) }

    /** A text as a vector of length 1, to compare with others'. */
    suspend fun embed(text: String, pooling: Pooling = Pooling.MEAN): FloatArray = Token().use { token ->
        offMain(token::cancel) { Native.embed(id, text, pooling == Pooling.LAST, token.id) }
    }

    /** Prepares a run that teaches the model: reads the data, and chooses settings that are not given by a short probe. */
    suspend fun trainer(options: TrainingOptions, onEvent: (TrainingEvent) -> Unit = {}): Trainer =
        Trainer.prepare(id, options, onEvent)

    /** What it takes now. */
    suspend fun memory(): MemoryUse = offMain { Native.engineInfo(id).let { MemoryUse(it[0], it[1], it[2]) } }

    companion object {
        /** The library's version. */
        val version: String get() = Native.version()

        /** Opens the model in a folder. Its weights are mapped, not read into memory. */
        suspend fun open(path: String, options: Options = Options()): PocketLora =
            offMain { PocketLora(Native.engineOpen(path, options.json())) }

        /** What a model will take, before it is opened, and what [training] will. No weights are read. */
        suspend fun estimate(
            path: String,
            options: Options = Options(),
            training: Map<String, Any>? = null,
        ): MemoryEstimate = offMain {
            val found = Native.estimate(path, options.json(), training?.let(::json))
            MemoryEstimate(found[0], found[1], found[2], found[3], found[4], found[5], found[6])
        }
    }
}

/** An attached adapter. [close] detaches it; answers that are being given end with it. */
class Adapter internal constructor(number: Long) : Handle(number) {
    /** What is odd about it, though nothing that stops it from working. */
    suspend fun warnings(): List<String> = offMain { Native.adapterWarnings(id).toList() }

    /** Multiplies its effect by another number, from the next question on. */
    suspend fun scale(scale: Float) = offMain { Native.adapterScale(id, scale) }

    /** Detaches it, where it matters that this works and takes no time of the main thread. */
    suspend fun detach() = offMain { close() }

    override fun free(number: Long) = Native.detach(number)
}

internal inline fun closeIfFails(handle: AutoCloseable, work: () -> Unit) {
    try {
        work()
    } catch (e: Throwable) {
        handle.close()
        throw e
    }
}
