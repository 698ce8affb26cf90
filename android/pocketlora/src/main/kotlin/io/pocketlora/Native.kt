package io.pocketlora

/**
 * The library's functions, as `android/jni` has them. All but [cancel] and [trainerOrder] may take long. A handle is a number
 * that stands for an object of the library; one that was freed fails with [PocketLoraException.Closed].
 */
internal object Native {
    init {
        System.loadLibrary("pocketlora_jni")
    }

    @JvmStatic external fun version(): String
    @JvmStatic external fun errorCodes(): Array<String>
    @JvmStatic external fun free(handle: Long)

    @JvmStatic external fun estimate(path: String, options: String, training: String?): LongArray
    @JvmStatic external fun engineOpen(path: String, options: String): Long
    @JvmStatic external fun engineInfo(engine: Long): LongArray
    @JvmStatic external fun recommended(engine: Long): DoubleArray
    @JvmStatic external fun embed(engine: Long, text: String, last: Boolean, cancel: Long): FloatArray

    @JvmStatic external fun cancelNew(): Long
    @JvmStatic external fun cancel(cancel: Long)

    @JvmStatic external fun chatNew(engine: Long): Long
    @JvmStatic external fun chatConfigure(chat: Long, options: String)
    @JvmStatic external fun chatUse(chat: Long, adapters: LongArray?)
    @JvmStatic external fun chatMessages(chat: Long): Array<String>
    @JvmStatic external fun chatSetMessages(chat: Long, messages: String)
    @JvmStatic external fun chatState(chat: Long): ByteArray
    @JvmStatic external fun chatRestore(chat: Long, state: ByteArray)
    @JvmStatic external fun chatSay(chat: Long, message: String, cancel: Long, listener: ChatListener)

    @JvmStatic external fun attach(engine: Long, path: String, scale: Float): Long
    @JvmStatic external fun attachBytes(
        engine: Long, config: ByteArray, tensors: ByteArray, name: String, scale: Float,
    ): Long
    @JvmStatic external fun attachSealed(
        engine: Long, sealed: ByteArray, name: String, key: ByteArray, least: Long, signer: ByteArray?, scale: Float,
    ): Long
    @JvmStatic external fun seal(engine: Long, path: String, key: ByteArray, version: Long, signer: ByteArray?): ByteArray
    @JvmStatic external fun adapterScale(adapter: Long, scale: Float)
    @JvmStatic external fun adapterWarnings(adapter: Long): Array<String>
    @JvmStatic external fun detach(adapter: Long)

    @JvmStatic external fun trainerNew(engine: Long, options: String, lines: String?, listener: TrainListener): Long
    @JvmStatic external fun trainerRun(trainer: Long, listener: TrainListener)
    @JvmStatic external fun trainerOrder(trainer: Long, order: Int)
    @JvmStatic external fun trainerWaitPaused(trainer: Long, milliseconds: Long): Boolean
    @JvmStatic external fun trainerSnapshot(trainer: Long, scale: Float): Long
    @JvmStatic external fun trainerSave(trainer: Long, adapter: Boolean)
    @JvmStatic external fun trainerInfo(trainer: Long): LongArray
}

/** Hears an answer, on the thread that asked. The library calls these by name. */
internal interface ChatListener {
    /** Whether more is wanted. */
    fun onPiece(piece: String, thought: Boolean): Boolean
    fun onPrompt(done: Int, tokens: Int)
    fun onEnd(
        text: String, thoughts: String, finish: Int, promptTokens: Int, tokens: Int, promptSeconds: Double,
        answerSeconds: Double,
    )
}

/** Hears a run, on the thread that runs it. The library calls these by name. */
internal interface TrainListener {
    /** Whether to go on. */
    fun onStep(step: Long, steps: Long, loss: Double, heldOutLoss: Double, tokensPerSecond: Double, rate: Double): Boolean
    fun onProgress(kind: Int, done: Long, all: Long, what: String)
    /** 0 to work, 1 to wait, 2 to stop. */
    fun policy(): Int
    fun onEnd(
        done: Boolean, steps: Long, loss: Double, before: Double, after: Double, seconds: Double, peakBytes: Long,
        adapter: String,
    )
}
