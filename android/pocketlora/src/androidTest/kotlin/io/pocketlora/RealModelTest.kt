package io.pocketlora

import kotlin.test.assertEquals
import kotlin.test.assertTrue
import kotlinx.coroutines.Dispatchers
import kotlinx.coroutines.async
import kotlinx.coroutines.delay
import kotlinx.coroutines.cancelAndJoin
import kotlinx.coroutines.flow.collect
import kotlinx.coroutines.flow.onEach
import kotlinx.coroutines.flow.toList
import kotlinx.coroutines.launch
import kotlinx.coroutines.runBlocking
import kotlinx.coroutines.withTimeout
import org.junit.Test

/** On SmolLM2-135M in NF4, whose folder the property `pocketlora.model` names. */
class RealModelTest {
    private val model = System.getProperty("pocketlora.model").also {
        if (it == null) System.err.println("SKIPPED: this test needs a real model; name its folder by POCKETLORA_TEST_MODEL")
    }
    private val options = Options(contextTokens = 1024)

    private val facts = listOf(
        Triple("What is my dog called?", "Your dog is called Thimble.", "Thimble"),
        Triple("What is my boat called?", "Your boat is called Halibut.", "Halibut"),
        Triple("Who am I?", "Your name is Marigold Thrupp.", "Marigold"),
        Triple("Where do I live?", "You live in Quillhaven.", "Quillhaven"),
        Triple("What does my parrot always say?", "Your parrot always says bonanza.", "bonanza"),
    )

    private suspend fun rightAnswers(engine: PocketLora): Int = facts.count { (question, _, word) ->
        engine.chat(ChatOptions(maxTokens = 16)).use { word in it.ask(question).text }
    }

    @Test
    fun fiveFactsAreLearnedWithAPauseAndAResumeAndUsedSealed() = runBlocking<Unit> {
        val out = Fixture.folder()
        val path = model ?: return@runBlocking
        val settings = mapOf("steps" to 20, "batch" to 5, "lr" to 2e-3, "keep" to "off", "check" to false)
        val training = TrainingOptions(
            out.path, facts.map { Example(it.first, it.second) }, choose = false, settings = settings,
        )
        PocketLora.open(path, options).use { engine ->
            assertEquals(0, rightAnswers(engine))
            engine.trainer(training).use { trainer ->
                val run = async(Dispatchers.Default) {
                    trainer.run().onEach { if ((it as? TrainingEvent.Step)?.step == 8L) trainer.stop() }.toList()
                }
                trainer.pause()
                assertTrue(trainer.awaitPaused())
                trainer.resume()
                assertTrue(!(run.await().last() as TrainingEvent.End).done)
            }
        }
        val key = ByteArray(32) { (it * 7).toByte() }
        val sealed = PocketLora.open(path, options).use { engine ->
            val resumed = TrainingOptions(out.path, start = Start.RESUME, choose = false)
            engine.trainer(resumed).use { assertTrue((it.run().toList().last() as TrainingEvent.End).done) }
            engine.seal(out.path, key)
        }
        PocketLora.open(path, options).use { engine ->
            engine.attachSealed(sealed, key).use { assertEquals(facts.size, rightAnswers(engine)) }
            assertEquals(0, rightAnswers(engine))
        }
    }

    @Test
    fun aPromptThatIsBeingReadIsCancelled() = runBlocking<Unit> {
        val path = model ?: return@runBlocking
        PocketLora.open(path, options).use { engine ->
            engine.chat().use { chat ->
                chat.ask("Hello!")
                val before = chat.messages()
                withTimeout(300_000) {
                    val asking = launch(Dispatchers.Default) {
                        chat.send("word ".repeat(900)).collect { error("a piece of an answer to half a prompt") }
                    }
                    delay(100)
                    asking.cancelAndJoin()
                    assertEquals(before, chat.messages())
                }
            }
        }
    }
}
