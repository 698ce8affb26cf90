package io.pocketlora

import java.util.concurrent.atomic.AtomicReference
import kotlinx.coroutines.Dispatchers
import kotlinx.coroutines.channels.awaitClose
import kotlinx.coroutines.channels.trySendBlocking
import kotlinx.coroutines.flow.Flow
import kotlinx.coroutines.flow.callbackFlow
import kotlinx.coroutines.launch

/** How tokens are chosen. The defaults take the likeliest. */
data class Sampling(
    val temperature: Float = 0f,
    val topK: Int = 0,
    val topP: Float = 1f,
    val minP: Float = 0f,
    val repetitionPenalty: Float = 1f,
    /** A guard against loops; a multiplier of 0 is none. */
    val dryMultiplier: Float = 0f,
    val dryBase: Float = 1.75f,
    val dryAllowedLength: Int = 2,
    val dryAfter: Int = 0,
    val seed: Long = 0,
) {
    internal companion object {
        fun of(found: DoubleArray) = Sampling(
            found[0].toFloat(), found[1].toInt(), found[2].toFloat(), found[3].toFloat(), found[4].toFloat(),
            found[5].toFloat(), found[6].toFloat(), found[7].toInt(), found[8].toInt(),
        )
    }
}

/** How a chat answers. */
data class ChatOptions(
    val sampling: Sampling = Sampling(),
    /** Most tokens of an answer. */
    val maxTokens: Int = 512,
    /** Texts at which an answer stops; they are no part of it. */
    val stop: List<String> = emptyList(),
    /** Whether a model that can think before it answers is to; its template decides if null. */
    val thinking: Boolean? = null,
    /** Tools that the model may call: a JSON list of schemas, as its template takes them. */
    val tools: String? = null,
) {
    internal fun json() = json(
        mapOf(
            "temperature" to sampling.temperature, "top_k" to sampling.topK, "top_p" to sampling.topP,
            "min_p" to sampling.minP, "repetition_penalty" to sampling.repetitionPenalty,
            "dry" to listOf(
                sampling.dryMultiplier, sampling.dryBase, sampling.dryAllowedLength, sampling.dryAfter,
            ),
            "seed" to sampling.seed, "max_tokens" to maxTokens, "stop" to stop, "thinking" to thinking,
            "tools" to tools?.let(::RawJson),
        ),
    )
}

/** One turn of a conversation; roles are `system`, `user`, `assistant`, `tool`. */
data class Message(val role: String, val content: String) {
    internal fun map() = mapOf("role" to role, "content" to content)
}

/** Why an answer ended. */
enum class Finish { STOP, LENGTH, CONTEXT, CANCELLED, OTHER }

/** An answer, and what it took. */
data class Answer(
    val text: String,
    val thoughts: String,
    val finish: Finish,
    val promptTokens: Int,
    val tokens: Int,
    val promptSeconds: Double,
    val answerSeconds: Double,
)

/** A conversation. One question at a time: another one meanwhile throws [PocketLoraException.Busy]. */
class Chat internal constructor(number: Long, options: ChatOptions) : Handle(number) {
    private val current = AtomicReference<Token?>()

    /** How it answers. */
    @Volatile var options: ChatOptions = options
        private set

    /** The last answer that was given whole or in part. */
    @Volatile var last: Answer? = null
        private set

    internal fun apply() = Native.chatConfigure(id, options.json())

    /** Answers in another way from the next question on. */
    suspend fun configure(options: ChatOptions) = offMain {
        Native.chatConfigure(id, options.json())
        this.options = options
    }

    /** Uses these adapters in their order, none if the list is empty, or all that are attached if it is null. */
    suspend fun use(adapters: List<Adapter>?) =
        offMain { Native.chatUse(id, adapters?.map(Adapter::id)?.toLongArray()) }

    /** What was said so far. */
    suspend fun messages(): List<Message> =
        offMain { Native.chatMessages(id).toList().chunked(2) { (role, content) -> Message(role, content) } }

    /** Puts another conversation in its place, such as a system prompt alone. */
    suspend fun setMessages(messages: List<Message>) =
        offMain { Native.chatSetMessages(id, json(messages.map(Message::map))) }

    /** What the model remembers, for [restore] in another process. It fits this model with these adapters alone. */
    suspend fun state(): ByteArray = offMain { Native.chatState(id) }

    /** Goes on from a [state], which saves the time of reading the conversation again. */
    suspend fun restore(state: ByteArray) = offMain { Native.chatRestore(id, state) }

    /**
     * Asks, and yields the answer's text as it comes. Question and answer are kept. Cancelling the collector stops the model
     * within the time of a layer, also while it reads the prompt. Thoughts are not in it; [last] has them.
     */
    fun send(text: String): Flow<String> = send(Message("user", text))

    /** As above, for a turn of any role. */
    fun send(message: Message): Flow<String> = callbackFlow {
        val token = Token()
        val work = launch(Dispatchers.IO) {
            token.use {
                last = say(message, it) { piece, thought -> thought || trySendBlocking(piece).isSuccess }
            }
            close()
        }
        awaitClose {
            token.cancel()
            work.cancel()
        }
    }

    /** Asks, and returns the whole answer. [onText] hears it as it comes, on another thread; what it throws ends the answer. */
    suspend fun ask(text: String, onText: (String) -> Unit = {}): Answer = Token().use { token ->
        offMain(token::cancel) {
            say(Message("user", text), token) { piece, thought ->
                if (!thought) onText(piece)
                true
            }.also { last = it }
        }
    }

    private fun say(message: Message, token: Token, onPiece: (String, Boolean) -> Boolean): Answer {
        var answer: Answer? = null
        val listener = object : ChatListener {
            override fun onPiece(piece: String, thought: Boolean) = onPiece(piece, thought)

            override fun onPrompt(done: Int, tokens: Int) {}

            override fun onEnd(
                text: String, thoughts: String, finish: Int, promptTokens: Int, tokens: Int, promptSeconds: Double,
                answerSeconds: Double,
            ) {
                val end = Finish.entries.getOrElse(finish) { Finish.OTHER }
                answer = Answer(text, thoughts, end, promptTokens, tokens, promptSeconds, answerSeconds)
            }
        }
        // A chat that is busy refuses; the token of the call that it is busy with stays.
        val mine = current.compareAndSet(null, token)
        try {
            Native.chatSay(id, json(message.map()), token.id, listener)
        } finally {
            if (mine) current.compareAndSet(token, null)
        }
        return checkNotNull(answer) { "an answer without an end" }
    }

    /** Stops the answer that is being given, from any thread; what was said so far is kept. */
    fun cancel() {
        current.get()?.cancel()
    }

    /** Stops its answer, and forgets the conversation. */
    override fun close() {
        cancel()
        super.close()
    }
}
