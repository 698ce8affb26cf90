package io.pocketlora

import java.io.File
import kotlin.test.assertEquals
import kotlin.test.assertFalse
import kotlin.test.assertTrue
import kotlinx.coroutines.Dispatchers
import kotlinx.coroutines.async
import kotlinx.coroutines.awaitAll
import kotlinx.coroutines.cancelAndJoin
import kotlinx.coroutines.delay
import kotlinx.coroutines.flow.collect
import kotlinx.coroutines.flow.take
import kotlinx.coroutines.flow.toList
import kotlinx.coroutines.launch
import kotlinx.coroutines.runBlocking
import kotlinx.coroutines.withTimeout
import org.junit.Test

class ChatTest {
    private suspend fun open() = PocketLora.open(Fixture.model, Fixture.options)

    private val short = ChatOptions(maxTokens = 12)

    @Test
    fun anAnswerComesInPiecesAndIsKept() = runBlocking<Unit> {
        open().use { engine ->
            engine.chat(short).use { chat ->
                val pieces = chat.send("hello \uD83D\uDE00").toList()
                val answer = checkNotNull(chat.last)
                assertEquals(answer.text, pieces.joinToString(""))
                assertTrue(answer.tokens in 1..12 && answer.promptTokens > 5, "$answer")
                assertEquals("hello \uD83D\uDE00", chat.messages().first().content)
                val state = chat.state()
                val again = chat.ask("and?")
                engine.chat(short).use { other ->
                    other.restore(state)
                    assertEquals(again.text, other.ask("and?").text)
                }
                chat.setMessages(listOf(Message("system", "be \"short\"\n")))
                assertEquals(listOf(Message("system", "be \"short\"\n")), chat.messages())
                chat.configure(ChatOptions(Sampling(temperature = 1f, topK = 5, seed = 7), maxTokens = 3, stop = listOf("x")))
                assertTrue(chat.ask("more").tokens <= 3)
                throws<PocketLoraException.Config>("temperature") {
                    chat.configure(ChatOptions(Sampling(temperature = -1f)))
                }
            }
        }
    }

    @Test
    fun aCancelledCollectorStopsTheModelAlsoInAPrompt() = runBlocking<Unit> {
        open().use { engine ->
            engine.chat(ChatOptions(maxTokens = 100_000)).use { chat ->
                withTimeout(60_000) {
                    assertEquals(1, chat.send("hello").take(1).toList().size)
                    // The model is free again: the flow has waited for the end of the work.
                    chat.configure(short)
                    assertTrue(chat.ask("again").tokens > 0)
                    // Before the first piece, or soon after it. RealModelTest is sure to meet the prompt.
                    chat.setMessages(emptyList())
                    val asking = launch(Dispatchers.Default) { chat.send("x".repeat(200)).collect() }
                    delay(1)
                    asking.cancelAndJoin()
                    chat.setMessages(emptyList())
                    assertTrue(chat.ask("still there?").tokens > 0)
                }
            }
        }
    }

    @Test
    fun aStopButtonEndsAnAnswerAndKeepsIt() = runBlocking<Unit> {
        open().use { engine ->
            engine.chat(ChatOptions(maxTokens = 100_000)).use { chat ->
                var pieces = 0
                val answer = chat.ask("hello") { if (++pieces == 3) chat.cancel() }
                assertEquals(Finish.CANCELLED, answer.finish)
                assertEquals(2, chat.messages().size)
            }
        }
    }

    @Test
    fun whatAListenerThrowsGoesOnAsItIsAndHarmsNothing() = runBlocking<Unit> {
        open().use { engine ->
            engine.chat(ChatOptions(maxTokens = 60)).use { chat ->
                throws<IllegalStateException>("my own") { chat.ask("hello") { error("my own") } }
                throws<IllegalStateException>("collected") { chat.send("hello").collect { error("collected") } }
                // What was said up to there is kept, as after a stop.
                assertEquals(4, chat.messages().size)
                assertTrue(chat.ask("hello").tokens > 0)
            }
        }
    }

    @Test
    fun whatIsClosedSaysSoAndIsFreedOnce() = runBlocking<Unit> {
        val engine = open()
        val chat = engine.chat(short)
        engine.close()
        engine.close()
        // The chat holds the model.
        assertTrue(chat.ask("hello").tokens > 0)
        throws<PocketLoraException.Closed>("engine") { engine.chat() }
        chat.close()
        chat.close()
        assertTrue(chat.isClosed)
        throws<PocketLoraException.Closed>("chat") { chat.ask("hello") }
        throws<PocketLoraException.Closed>("chat") { chat.send("hello").toList() }
        chat.cancel()
        throws<PocketLoraException.Closed>("bug of the wrapper") {
            open().use { Native.chatMessages(it.id) }
        }
        throws<PocketLoraException.Closed> { Native.chatMessages(Long.MIN_VALUE) }
        Native.free(12345)
    }

    @Test
    fun closingWhileItAnswersEndsTheAnswer() = runBlocking<Unit> {
        withTimeout(60_000) {
            open().use { engine ->
                val chat = engine.chat(ChatOptions(maxTokens = 100_000))
                val work = async(Dispatchers.Default) { chat.ask("hello") { chat.close() } }
                assertEquals(Finish.CANCELLED, work.await().finish)
                assertTrue(chat.isClosed)
            }
        }
    }

    @Test
    fun oneQuestionAtATimeAndManyChats() = runBlocking<Unit> {
        open().use { engine ->
            val chats = List(3) { engine.chat(short) }
            val answers = chats.map { chat -> async(Dispatchers.Default) { chat.ask("hello").text } }.awaitAll()
            assertEquals(1, answers.toSet().size)
            throws<PocketLoraException.Busy>("chat") {
                chats[0].ask("hello") { runBlocking { chats[0].ask("meanwhile") } }
            }
            chats.forEach(Chat::close)
        }
    }

    @Test
    fun errorsHaveCodesThatAreTheLibrarys() {
        val known = Native.errorCodes().associate { it.substringBefore('=') to it.substringAfter('=').toInt() }
        for ((name, code) in known) {
            val made = PocketLoraException.of(code, "m", "i", null)
            // A closed object is what the library calls a handle.
            val expected = if (name == "Handle") "Closed" else name
            assertEquals(expected to code, made::class.simpleName to made.code)
        }
        val later = PocketLoraException.of(known.values.max() + 1, "m", "i", "n")
        assertTrue(later is PocketLoraException.Unknown && later.next == "n")
        val file = System.getProperty("pocketlora.errors")?.let(::File) ?: return
        val listed = Regex("""^ {4}([A-Z]\w+) = (\d+),$""", RegexOption.MULTILINE).findAll(file.readText())
        assertEquals(known, listed.associate { it.groupValues[1] to it.groupValues[2].toInt() })
    }

    @Test
    fun errorsNameWhatFailedAndTheNextStep() = runBlocking<Unit> {
        val error = throws<PocketLoraException.Io>("no-such-model") { PocketLora.open("/no-such-model") }
        assertTrue("no-such-model" in error.item && error.code == 1)
        throws<PocketLoraException.Config>("threads") { PocketLora.open(Fixture.model, Options(threads = 100_000)) }
    }

    @Test
    fun aBudgetRefusesBeforeAnythingIsOpened() = runBlocking<Unit> {
        val estimate = PocketLora.estimate(Fixture.model, Fixture.options, mapOf("steps" to 1))
        assertTrue(estimate.parameters > 0 && estimate.fullChatBytes > 0 && estimate.trainingBytes > 0, "$estimate")
        val needed = estimate.openBytes + estimate.fullChatBytes
        PocketLora.open(Fixture.model, Fixture.options.copy(memoryBudgetBytes = needed)).use {
            assertTrue(it.memory().mappedBytes > 0)
        }
        throws<PocketLoraException.OutOfMemory>("smaller context") {
            PocketLora.open(Fixture.model, Fixture.options.copy(memoryBudgetBytes = needed - 1))
        }
    }

    @Test
    fun aTextIsAVector() = runBlocking<Unit> {
        open().use { engine ->
            val vector = engine.embed("hello")
            assertEquals(1.0, vector.sumOf { it.toDouble() * it }, 1e-4)
            assertFalse(vector.contentEquals(engine.embed("hello", Pooling.LAST)))
        }
    }

    @Test
    fun aPanicBecomesAnExceptionAndTheLibraryWorksOn() = runBlocking<Unit> {
        val error = throws<PocketLoraException.Internal>("a bug on purpose") { Panics.panic() }
        assertEquals(15, error.code)
        open().use { engine -> engine.chat(short).use { assertTrue(it.ask("hello").tokens > 0) } }
    }
}

/** Of a library that was built with the feature `panics`. */
internal object Panics {
    init {
        PocketLora.version
    }

    @JvmStatic external fun panic()
}
